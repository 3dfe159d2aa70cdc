"""The gate: its statistics against closed forms, its verdicts on numbers made for them, models that must fail it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mxharness import agreement, cli, perplexity, text
from mxharness.errors import UserError
from mxharness.gate import (
    compared,
    defects,
    divergence,
    judged,
    noise,
    references,
    sequence,
    simulate,
    statistics,
    stored,
    verdict,
)
from mxharness.gate.verdict import Failed, Rules, Window
from mxharness.model import embedded, reference, toy
from mxharness.model.checkpoint import values
from mxharness.protocols import PROTOCOLS, Protocol, Span, select
from safetensors.numpy import save_file

TOY = Protocol("toy", 32, 32, 17, 17, False, "windows of 32, second half")
SAMPLE = text.Text("sample", "sample (not WikiText-2)", "In 2004, 1 of 12 bytes <|end|> were naïve.\n" * 40, "0" * 64)
RULES = Rules(0.005)
CPU = torch.device("cpu")


# Statistics


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 63, 591])
def test_students_t_is_the_incomplete_beta_function(freedom):
    mpmath = pytest.importorskip("mpmath", reason="not compared: Student's t with mpmath's")
    for t in (-30.0, -2.5, -0.1, 0.0, 0.7, 1.67, 12.0):
        tail = float(mpmath.betainc(freedom / 2, 0.5, 0, freedom / (freedom + t * t), regularized=True)) / 2
        assert statistics.student_cdf(t, freedom) == pytest.approx(tail if t < 0 else 1 - tail, abs=1e-13)
    quantile = statistics.student_quantile(0.95, freedom)
    assert statistics.student_cdf(quantile, freedom) == pytest.approx(0.95, abs=1e-12)


def test_windows_are_the_units():
    generator = np.random.default_rng(0)
    means = generator.normal(size=12)
    found = statistics.clustered(means * 255, np.full(12, 255.0))
    assert found.mean == pytest.approx(means.mean(), rel=1e-12)
    assert found.error == pytest.approx(means.std(ddof=1) / math.sqrt(12), rel=1e-12)
    assert found.upper - found.mean == pytest.approx(1.795884818704043 * found.error, rel=1e-12)
    assert (found.windows, found.tokens) == (12, 12 * 255)
    short = statistics.clustered(np.array([100.0, 1.0]), np.array([100.0, 1.0]))
    assert (short.mean, short.error) == (1.0, 0.0)
    one = statistics.clustered(np.array([3.0]), np.array([10.0]))
    assert (one.lower, one.upper) == (-math.inf, math.inf)


def test_holm_is_the_step_down_procedure():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.5, 0.9]) == [1.0, 1.0]
    assert statistics.holm([0.02]) == [0.02]


# Divergence


def pair(scale, rows=400, words=700):
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(rows, words, generator=generator)
    return p, p + scale * torch.randn(rows, words, generator=generator)


@pytest.mark.parametrize("scale", [1e-3, 0.05, 0.3, 2.0])
def test_the_estimate_is_unbiased_and_the_bound_a_bound(scale):
    p, q = pair(scale)
    p_log, q_log = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kl = (p_log.exp() * (p_log - q_log)).sum(-1)
    full = divergence.in_full(p, q)
    assert (full.kl - kl).abs().max() <= 1e-6 + 1e-5 * scale
    found = [divergence.from_cells(divergence.cells(p, 16, 8, seed), q) for seed in range(24)]
    estimates = torch.stack([each.kl.mean() for each in found])
    error = float(estimates.std() / math.sqrt(len(found)))
    assert abs(float(estimates.mean() - kl.mean())) <= 4 * error + 1e-9
    assert (found[0].bound <= kl + 1e-6).all()
    assert 0 < found[0].bound.mean() < 0.9 * kl.mean()  # so the estimate, not the bound, is what is judged
    assert torch.equal(full.same, p.argmax(-1) == q.argmax(-1))
    assert torch.equal(found[0].same, full.same)


def test_a_small_vocabulary_is_stored_whole():
    p, q = pair(0.1, words=40)
    cells = divergence.cells(p, 64, 16, 0)
    assert (cells.top.shape[1], cells.drawn.shape[1]) == (40, 0)
    found, full = divergence.from_cells(cells, q), divergence.in_full(p, q)
    assert (found.kl - full.kl).abs().max() <= 1e-6
    assert (found.bound - full.kl).abs().max() <= 1e-6


def test_a_candidate_that_is_the_reference_has_no_divergence():
    p, _ = pair(0.0)
    for found in (divergence.in_full(p, p), divergence.from_cells(divergence.cells(p, 16, 8, 0), p)):
        assert found.kl.abs().max() == 0
        assert found.bound.abs().max() <= 1e-6
        assert found.same.all()


# Verdicts


def windows(change, spread, count=64, kl=1e-3, same=1.0, seed=0):
    """Windows of 255 tokens whose mean NLL moves by exactly `change` on average, by `spread` between windows."""
    generator = np.random.default_rng(seed)
    moves = generator.normal(size=count)
    moves = change + spread * (moves - moves.mean()) / moves.std(ddof=1)
    made = []
    for i, move in enumerate(moves):
        base = generator.exponential(3.0, 255)
        agree = (np.arange(255) < round(255 * same)).astype(float)
        span = Span(512 * i, 512 * i + 512, 512 * i + 257)
        made.append(Window(span, base, base + move, np.full(255, kl), np.full(255, kl), agree))
    return made


@pytest.mark.parametrize(
    ("change", "spread", "kl", "same", "word", "reason"),
    [
        (0.0, 0.01, 1e-3, 1.0, "pass", "no worse than by 0.50%"),
        (0.02, 0.01, 1e-3, 1.0, "fail", r"perplexity moves by \+2.020%, .*: worse by more than 0.50%"),
        (-0.02, 0.01, 1e-3, 1.0, "drift", r"perplexity moves by -1.980%, .*: too good"),
        (0.0, 0.05, 1e-3, 1.0, "inconclusive", "0.50% is not ruled out"),
        (0.006, 0.05, 1e-3, 1.0, "inconclusive", "0.50% is not ruled out"),
        (-0.006, 0.05, 1e-3, 1.0, "pass", "no worse than"),
        (0.003, 0.001, 1e-3, 1.0, "pass", "no worse than"),
        (0.0, 0.01, 5e-3, 1.0, "fail", "mean KL 5.00e-03, at least 5.00e-03: more than 4.00e-03"),
        (-0.02, 0.01, 5e-3, 1.0, "fail", "mean KL 5.00e-03"),
        (0.0, 0.01, 1e-3, 0.94, "fail", "the reference's for 94.12% of the tokens, not 95%"),
    ],
)
def test_verdicts(change, spread, kl, same, word, reason):
    found = verdict.judge(windows(change, spread, kl=kl, same=same), RULES)
    assert found.verdict == word
    assert found.passed is (word == "pass")
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(found.reason)
    assert (found.needed > 0) is (word == "inconclusive")
    assert found.change.mean == pytest.approx(change, abs=1e-12)
    assert found.detectable == pytest.approx(math.expm1(3.29 * spread / 8), rel=1e-9)


def test_kl_open_is_inconclusive_and_noise_widens_its_limit():
    wide = [replace(window, kl=window.kl * (1 + i % 9)) for i, window in enumerate(windows(0.0, 0.01, kl=8e-4))]
    found = verdict.judge(wide, RULES)
    assert found.divergence.lower < 4e-3 < found.divergence.upper
    assert (found.verdict, found.needed > found.change.tokens) == ("inconclusive", True)
    assert verdict.judge(wide, replace(RULES, noise=2e-3)).verdict == "pass"
    assert verdict.judge(wide, replace(RULES, noise=1e-3)).limit == 4e-3


def test_numbers_beside_a_verdict():
    made = windows(0.0, 0.01)
    made[7] = replace(made[7], kl=np.full(255, 3e-3))
    found = verdict.judge(made, RULES)
    assert found.worst == (7 * 512, pytest.approx(3e-3))
    assert found.percentiles == (pytest.approx(3e-3), pytest.approx(3e-3))
    assert found.divergence.mean == pytest.approx((63e-3 + 3e-3) / 64)


@pytest.mark.parametrize("what", ["reference", "candidate", "kl"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_fail(what, value):
    made = windows(0.0, 0.01)
    spoilt = getattr(made[3], what).copy()
    spoilt[10:12] = value
    made[3] = replace(made[3], **{what: spoilt})
    with pytest.raises(Failed, match=r"NaN or infinite for 2 of 255 tokens of the window at token 1536, first .* 1803"):
        verdict.judge(made, RULES)


def test_nothing_fails():
    with pytest.raises(Failed, match="no token was scored"):
        verdict.judge([], RULES)
    with pytest.raises(Failed, match="the text gives no window"):
        sequence.run((), [(lambda spans: [], RULES)])


def test_one_of_many_gates_needs_more_to_fail():
    """Worse by more than the margin, p = 0.02: fails alone, is left open among five."""
    spread = 0.05
    change = statistics.student_quantile(0.98, 63) * spread / 8
    suspect = windows(change, spread)
    assert verdict.judge(suspect, RULES).verdict == "fail"
    healthy = (windows(0.0, 0.001, seed=1), RULES)
    found = verdict.judge_together([(suspect, RULES), *[healthy] * 4])
    assert [one.verdict for one in found] == ["inconclusive", *["pass"] * 4]


# Sequence


def reader(change, spread, kl=1e-3, count=592):
    made = {window.span: window for window in windows(change, spread, count, kl)}
    read: list[Span] = []

    def measure(spans):
        read.extend(spans)
        return [made[span] for span in spans]

    return tuple(made), measure, read


def test_windows_double_while_the_verdict_is_open():
    assert sequence.stages(592) == (64, 128, 256, 512, 592)
    assert sequence.stages(64) == (64,)
    assert sequence.stages(5) == (5,)
    available, measure, read = reader(0.0, 0.03)
    (found,) = sequence.run(available, [(measure, RULES)])
    assert found.verdict == "pass"
    assert found.change.windows == 128
    assert len(read) == len(set(read)) >= 128
    available, measure, read = reader(0.0, 0.005)
    (found,) = sequence.run(available, [(measure, RULES)])
    assert (found.verdict, found.change.windows) == ("pass", 64)
    assert set(select(available, 64)) <= set(read)


def test_what_stays_open_does_not_pass_and_says_what_it_would_take():
    available, measure, read = reader(0.001, 0.6)
    (found,) = sequence.run(available, [(measure, RULES)])
    assert (found.verdict, found.passed, len(read)) == ("inconclusive", False, 592)
    wanted = (3.29 * found.change.error / math.log1p(0.005)) ** 2 * found.change.tokens
    assert found.needed >= 0.99 * wanted > 592 * 255
    assert f"after all 592 windows, 150,960 tokens; it would take about {found.needed:,} tokens" in found.reason


def test_a_diverging_candidate_fails_on_a_few_windows():
    available, measure, read = reader(0.0, 0.01, kl=0.05)
    (found,) = sequence.run(available, [(measure, RULES)])
    assert (found.verdict, len(read)) == ("fail", sequence.GLANCE)


def test_several_candidates_stop_on_their_own():
    available, first, few = reader(0.0, 0.005)
    _, second, all_of_them = reader(0.001, 0.6)
    found = sequence.run(available, [(first, RULES), (second, RULES)])
    assert [one.verdict for one in found] == ["pass", "inconclusive"]
    assert len(few) < 130
    assert len(all_of_them) == 592


# Models


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> perplexity.Reading:
    monkeypatch.setitem(PROTOCOLS, "toy", TOY)
    return perplexity.read(toy.checkpoint(), SAMPLE, "toy")


def through_the_gate(reading, healthy, spoilt):
    candidate = compared.together(reference.float32(healthy), reference.float32(spoilt), reading.ids)
    return sequence.run(reading.available[:12], [(candidate, RULES)])[0]


def test_the_same_bytes_pass(reading):
    healthy = defects.quantised(toy.checkpoint(), defects.everything)
    found = through_the_gate(reading, healthy, healthy)
    assert (found.verdict, found.divergence.mean, found.change.mean, found.same) == ("pass", 0.0, 0.0, 1.0)


@pytest.mark.parametrize("name", ["ties-away", "flipped-codes", "other-scale-rule"])
def test_spoilt_weights_fail(reading, name):
    model = toy.checkpoint()
    healthy, spoilt = (defects.quantised(model, defects.everything, d) for d in (None, defects.DEFECTS[name]))
    found = through_the_gate(reading, healthy, spoilt)
    assert found.verdict == "fail"
    assert found.divergence.lower > found.limit


def test_defects_are_as_large_as_they_say():
    matrix = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    healthy = defects.quantize(matrix)
    shares = {}
    for name, defect in defects.DEFECTS.items():
        codes, scales = defect.spoil(matrix, torch.Generator().manual_seed(1))
        bits = (codes ^ healthy.codes).to(torch.int64)
        elements = sum(int(((bits >> shift) & 15 != 0).sum()) for shift in (0, 4)) / matrix.numel()
        zero = (codes.reshape(-1, 16) == 0).all(-1).double().mean().item()
        shares[name] = (elements, (scales != healthy.scales).double().mean().item(), zero)
    assert shares["flipped-codes"] == (pytest.approx(0.01, rel=0.05), 0, 0)
    assert shares["doubled-scales"] == (0, pytest.approx(1e-3, rel=0.2), 0)
    assert shares["zeroed-blocks"][1:] == (0, pytest.approx(3e-4, rel=0.6))
    assert shares["ties-away"][0] > 1e-3
    assert shares["ties-away"][1] == 0
    assert shares["other-scale-rule"][1] > 0.05


def test_a_stored_reference_says_what_a_run_beside_says(reading, tmp_path):
    model = toy.checkpoint()
    spans = reading.available[:16]
    kept = stored.collect(model, reading, spans, CPU, top=16, drawn=8)
    path = tmp_path / "toy.safetensors"
    stored.save(kept, path)
    again = stored.load(path)
    candidate = noise.honest(model, "bf16", CPU)
    beside = list(compared.together(reference.decoded(model), candidate, reading.ids)(spans))
    for found in (kept, again):
        apart = list(compared.against(found, candidate, reading.ids)(spans))
        for ours, theirs in zip(apart, beside, strict=True):
            assert np.array_equal(ours.candidate, theirs.candidate)
            assert np.array_equal(ours.reference, theirs.reference)
            assert np.array_equal(ours.same, theirs.same)
            assert (ours.bound <= theirs.kl + 1e-6).all()
        kl = [np.mean([window.kl.mean() for window in each]) for each in (apart, beside)]
        assert kl[0] == pytest.approx(kl[1], rel=0.1)
    assert again.cost(again.spans).mean == pytest.approx(kept.cost(kept.spans).mean, rel=1e-12)
    assert path.stat().st_size < 15 * len(spans) * (8 + 6 * 24) + 4000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_sha256": "2" * 64}, "the model is not the baseline's: model_sha256 .* -> 2222"),
        ({"text_sha256": "2" * 64}, "the text is not the baseline's"),
        ({"ids_sha256": "2" * 64}, r"the tokenizer \(the text is the same\) is not the baseline's"),
        ({"protocol": "other"}, "the protocol is not the baseline's: protocol toy -> other"),
    ],
)
def test_another_experiment_is_not_compared(reading, change, message):
    kept = stored.collect(toy.checkpoint(), reading, reading.available[:2], CPU, top=4, drawn=2)
    kept.require(reading, "mxfp4 (floor, even)")
    with pytest.raises(Failed, match=message):
        kept.require(replace(reading, **change), "mxfp4 (floor, even)")
    with pytest.raises(Failed, match="the weights' format is not the baseline's"):
        kept.require(reading, "mxfp4 (even, even)")


def test_files_that_are_no_baseline_are_one_sentence(reading, tmp_path):
    with pytest.raises(UserError, match=r"no gate baseline .*none.safetensors; `mxharness gate create` makes one"):
        stored.load(tmp_path / "none.safetensors")
    path = tmp_path / "toy.safetensors"
    stored.save(stored.collect(toy.checkpoint(), reading, reading.available[:2], CPU, top=4, drawn=2), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is no gate baseline"):
        stored.load(path)
    path.write_bytes(whole.replace(b'"version":"1"', b'"version":"9"'))
    with pytest.raises(UserError, match="of another version"):
        stored.load(path)
    kept = stored.collect(toy.checkpoint(), reading, reading.available[:2], CPU, top=4, drawn=2)
    for name, cut in (("nll", kept.columns["nll"][1:]), ("drawn", kept.columns["drawn"][:, 1:])):
        stored.save(replace(kept, columns={**kept.columns, name: cut}), path)
        with pytest.raises(UserError, match=f"is damaged: {name} is not of 30 rows"):
            stored.load(path)
    cut = np.array([[0, 32], [32, 64]])
    whole = {name: np.ascontiguousarray(column) for name, column in kept.columns.items()}
    save_file({**whole, "windows": cut}, path, {**kept.fixed, "version": "1"})
    with pytest.raises(UserError, match="is damaged: windows is not of three columns"):
        stored.load(path)
    with pytest.raises(UserError, match="no gate baseline 'nothing'; "):
        stored.find("nothing")


def test_a_baseline_that_does_not_exist_is_told_before_a_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("mxharness.commands.gate.load", lambda model, source: pytest.fail("a model was loaded"))
    assert run(capsys, "gate", "--baseline", "nothing", "--device", "host")[0] == 2


# The command


@pytest.fixture
def toy_command(monkeypatch, reading):
    monkeypatch.setattr("mxharness.commands.gate.load", lambda model, source: (toy.checkpoint(), SAMPLE))
    monkeypatch.setitem(PROTOCOLS, "windows-512-half", TOY)
    return ("--device", "host", "--model", "toy")


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    return ended.value.code, capsys.readouterr().out


def test_the_command_judges_beside_and_against_a_baseline(toy_command, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(agreement.LIMITS, "fp16", replace(agreement.LIMITS["fp16"], relative=0.2))
    path = str(tmp_path / "toy.safetensors")
    code, out = run(capsys, "gate", "--json", "--windows", "12", *toy_command)
    beside = json.loads(out)
    assert (code, beside["passed"], beside["gates"]["fp16"]["verdict"]) == (0, True, "pass"), out
    assert beside["gates"]["fp16"]["divergence"]["mean"] > 0
    code, out = run(capsys, "gate", "create", path, *toy_command, "--windows", "12")
    assert code == 0
    assert "12 windows, 180 scored tokens" in out
    code, out = run(capsys, "gate", "--json", "--baseline", path, *toy_command)
    against = json.loads(out)
    assert (code, against["passed"]) == (0, True), out
    assert against["gates"]["fp16"]["change"] == pytest.approx(beside["gates"]["fp16"]["change"])
    assert against["format"]["mean"] != 0
    code, out = run(capsys, "gate", "--baseline", path, *toy_command)
    assert (code, "the same bits" in out, "PASS: kernels with fp16 activations" in out) == (0, True, True), out
    assert run(capsys, "gate", "create", path, *toy_command)[0] == 2


def test_a_moved_reference_fails(toy_command, capsys, tmp_path):
    path = tmp_path / "toy.safetensors"
    kept = judged.make_baseline(toy.checkpoint(), SAMPLE, CPU, "windows-512-half", windows=8, top=4, drawn=2)
    for column in ("nll", "original"):
        moved = {**kept.columns, column: kept.columns[column] + np.float32(0.002)}
        stored.save(replace(kept, columns=moved), path)
        code, out = run(capsys, "gate", "--baseline", str(path), *toy_command)
        assert code == 1
        assert "is not what the baseline holds: -2.00e-03 nats per token over 8 windows" in out


def test_what_the_format_costs_must_not_move_either(toy_command, capsys, tmp_path):
    """Both references stay within what each may move by, in opposite directions."""
    path = tmp_path / "toy.safetensors"
    kept = judged.make_baseline(toy.checkpoint(), SAMPLE, CPU, "windows-512-half", windows=8, top=4, drawn=2)
    moved = {"nll": np.float32(7e-4), "original": np.float32(-7e-4)}
    stored.save(
        replace(kept, columns=kept.columns | {name: kept.columns[name] + by for name, by in moved.items()}), path
    )
    code, out = run(capsys, "gate", "--baseline", str(path), *toy_command)
    assert code == 1
    assert "what the format costs is not what the baseline holds: -1.40e-03 nats per token" in out


def test_a_reference_that_does_not_repeat_itself_is_shown(toy_command, capsys, monkeypatch):
    code, out = run(capsys, "gate", "--windows", "2", "--json", *toy_command)
    assert json.loads(out)["repeated"] == {"windows": 1, "kl": 0.0, "largest": 0.0}, code
    assert "the reference twice, 1 window: the same bits" in json.loads(out)["notes"]
    decoded, generator = reference.decoded, torch.Generator().manual_seed(0)

    def unsteady(*arguments):
        plain = decoded(*arguments)

        def logits(states):
            made = plain.logits(states)
            return made + 1e-3 * torch.randn(made.shape, generator=generator)

        return replace(plain, logits=logits)

    monkeypatch.setattr(reference, "decoded", unsteady)
    _, out = run(capsys, "gate", "--windows", "2", "--json", *toy_command)
    found = json.loads(out)
    assert 1e-7 < found["repeated"]["kl"] < 1e-5
    assert 1e-4 < found["repeated"]["largest"] < 1e-2
    _, out = run(capsys, "gate", "--windows", "2", *toy_command)
    assert "the reference twice, 1 window: NOT the same bits, mean KL " in out


def test_the_formats_cost_is_reported_where_the_original_is_at_hand(reading, capsys, toy_command, monkeypatch):
    _, out = run(capsys, "gate", "--windows", "12", "--json", *toy_command)
    found = json.loads(out)
    model, spans = toy.checkpoint(), select(reading.available, 12)
    decoded, original = (
        perplexity.measure(reading, runner, windows=12)
        for runner in (reference.decoded(model), reference.float32(model))
    )
    assert found["format"]["mean"] == pytest.approx(decoded.mean_nll - original.mean_nll, rel=1e-5)
    assert found["format"]["lower"] < found["format"]["mean"] < found["format"]["upper"]
    assert (found["format"]["windows"], found["format"]["tokens"]) == (12, decoded.scored)
    kept = stored.collect(model, reading, spans, CPU, top=4, drawn=2)
    assert kept.cost(spans).mean == pytest.approx(found["format"]["mean"], rel=1e-5)
    quantised = defects.quantised(model, defects.everything)  # what it was made of is gone
    assert (references.has_original(model), references.has_original(quantised)) == (True, False)
    assert stored.collect(quantised, reading, spans, CPU, top=4, drawn=2).cost(spans) is None
    monkeypatch.setattr("mxharness.commands.gate.load", lambda model, source: (quantised, SAMPLE))
    _, out = run(capsys, "gate", "--windows", "2", "--json", *toy_command)
    assert json.loads(out)["format"] is None
    assert "what the format costs is not known: the weights before MXFP4 are not at hand" in json.loads(out)["notes"]
    monkeypatch.setattr("mxharness.commands.gate.original_of", lambda _: model)
    _, out = run(capsys, "gate", "--windows", "12", "--json", *toy_command)
    assert json.loads(out)["format"] == found["format"]


# An honest candidate's noise


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_overflows_is_no_noise(value):
    honest = windows(0.0, 0.01, kl=2e-3)
    assert noise.level(honest) == pytest.approx(2e-3)
    broken = replace(honest[5], kl=np.where(np.arange(255) == 7, value, 2e-3))
    assert noise.level([*honest[:5], broken, *honest[6:]]) == 0


def test_a_candidate_with_other_words_is_no_honest_one():
    """Its KL, were it noise, would widen the limit to 20 nats."""
    assert noise.level(windows(6.4, 0.01, kl=6.65, same=0.016)) == 0
    assert noise.level(windows(0.0, 0.01, kl=6e-3, same=0.96)) == pytest.approx(6e-3)


def test_an_honest_candidate_does_not_overflow_in_its_norms(reading):
    """States past 256, whose squares are no fp16: the norm is float32 inside, as on the kernels."""
    model = toy.checkpoint()
    wide = values(model.tensors["embedding"]) * 3000
    tensors = {**model.tensors, "embedding": replace(model.tensors["embedding"], read=lambda: wide)}
    large = replace(model, tensors=tensors, config=replace(model.config))
    runner = noise.honest(large, "fp16", CPU)
    states = runner.hidden_states(torch.from_numpy(reading.ids[None, :32].astype(np.int64)))
    assert states.dtype == torch.float16
    assert states.isfinite().all()
    assert (states.double().square().mean(-1) > 0.01).all()  # what overflows is divided by infinity


def test_a_baseline_whose_noise_is_no_number_is_damaged(reading, tmp_path):
    kept = stored.collect(toy.checkpoint(), reading, reading.available[:2], CPU, top=4, drawn=2)
    for value in ("inf", "nan", "-1", "much"):
        stored.save(replace(kept, fixed={**kept.fixed, "noise_fp16": value}), tmp_path / "toy.safetensors")
        with pytest.raises(UserError, match=f"is damaged: noise_fp16 is {value}, not a finite number of nats"):
            stored.load(tmp_path / "toy.safetensors")


def test_too_short_a_text_fails(toy_command, capsys):
    code, out = run(capsys, "gate", "--limit", "31", *toy_command)
    assert code == 1
    assert "FAIL: nothing to score: sample (not WikiText-2) gives 31 tokens, windows-512-half needs 32" in out


# Error rates


def test_simulated_rates_are_those_of_the_design():
    """Windows that vary as bf16 rounding makes them: 21 suffice for a margin of 0.5 % at 95 % either way."""
    pool = np.random.default_rng(1).normal(size=592) * math.log1p(0.005) * math.sqrt(21) / 3.29
    none, margin, twice, gain = simulate.rates(pool + 0.02, (0.0, 0.005, 0.01, -0.01), 0.005, trials=150)
    assert none.ended == {"pass": 1.0}
    assert none.windows == 64
    assert 0 < margin.once["pass"] < 0.15
    assert margin.ended["fail"] > 0.5
    assert margin.windows > 64
    assert margin.once["inconclusive"] > margin.ended.get("inconclusive", 0) + 0.1
    assert twice.ended == {"fail": 1.0}
    assert gain.ended == {"drift": 1.0}
    assert sum(margin.once.values()) == pytest.approx(1) == sum(margin.ended.values())
    with pytest.raises(UserError, match="two windows or more, not of 1"):
        simulate.rates([0.1], (0.0,), 0.005)


def test_the_command_simulates_from_a_file(capsys, tmp_path):
    path = tmp_path / "differences.json"
    path.write_text(
        json.dumps({"api_version": 1, "candidates": {"a": {"margin": 0.005, "differences": [0.001, -0.001]}}})
    )
    code, out = run(capsys, "gate", "simulate", str(path), "--trials", "5", "--json")
    found = json.loads(out)["rates"]
    assert code == 0
    assert [row["change"] for row in found] == [0.0, 0.0025, 0.005, 0.01, -0.01]
    assert found[0]["ended"] == {"pass": 1.0}


@pytest.mark.parametrize(
    "candidates",
    [None, {}, {"a": 3}, {"a": {}}, {"a": {"margin": "x", "differences": [1, 2]}}, {"a": {"margin": 0.005}},
     {"a": {"margin": 0.005, "differences": [1, None]}}, {"a": {"margin": -1, "differences": [1, 2]}},
     {"a": {"margin": 0.005, "differences": [1, math.nan]}}],
)  # fmt: skip
def test_a_file_without_differences_is_one_sentence(tmp_path, candidates):
    path = tmp_path / "differences.json"
    path.write_text(json.dumps({"api_version": 1, "candidates": candidates}))
    with pytest.raises(UserError, match="is no file of differences: candidates, each with a margin and a list"):
        simulate.read(path)


# The embedded model


@pytest.fixture(scope="module")
def kept():
    return stored.load(stored.find("embedded"))


@pytest.fixture(scope="module")
def tokens():
    return perplexity.read(embedded.embedded(), text.load_text("default"))


def test_the_embedded_model_passes_its_baseline(device):
    found = judged.judge_model(
        embedded.embedded(), text.load_text("default"), device, ("fp16",), "windows-512-half", windows=8,
        baseline="embedded", original=embedded.embedded(original=True),
    )  # fmt: skip
    assert found.passed, found.judgements["fp16"].reason
    assert found.cost.lower > 0.02  # of log perplexity: what MXFP4 costs this model is seen


@pytest.mark.parametrize("name", [None, *defects.DEFECTS])
def test_planted_defects_of_the_embedded_model(kept, tokens, name):
    original = embedded.embedded(original=True)
    defect = defects.DEFECTS[name] if name else None
    candidate = reference.float32(defects.quantised(original, defects.everything, defect))
    found = verdict.judge(list(compared.against(kept, candidate, tokens.ids)(select(kept.spans, 8))), RULES)
    if name is None:
        assert found.verdict == "pass", found.reason
        assert found.divergence.mean < 1e-6
    else:
        assert found.verdict == "fail", found.reason
