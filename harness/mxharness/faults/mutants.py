"""Generated mutants: every small slip of the pen that a grammar of slips finds in the kernels' text.

A mutant is an edit of one place of one file. Comments, strings, preprocessor lines, static assertions, launch bounds,
inline assembly, what the device's compiler does not see and what the host has in a GPU's place are left alone. The
operators are those of DeMillo, Lipton and Sayward (1978) as far as kernels have a use for them, and what CUDA adds:
barriers.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mxharness.device.source import Sources
from mxharness.errors import UserError

Edit = tuple[int, int, str]
"""Characters start .. end become this text."""


@dataclass(frozen=True, order=True)
class Mutant:
    """One edit: in `file`, characters `start` to `end` become `new`."""

    file: str
    start: int
    end: int
    operator: str
    new: str

    def line(self, sources: Sources) -> int:
        """Number of the line it begins on."""
        return sources.text(self.file).count("\n", 0, self.start) + 1

    def before(self, sources: Sources) -> str:
        """The line or lines it changes, as they are."""
        text = sources.text(self.file)
        end = text.find("\n", self.end)
        return text[text.rfind("\n", 0, self.start) + 1 : end if end >= 0 else len(text)]

    def after(self, sources: Sources) -> str:
        """The same lines with the edit."""
        begin = sources.text(self.file).rfind("\n", 0, self.start) + 1
        line = self.before(sources)
        return line[: self.start - begin] + self.new + line[self.end - begin :]


def generate(sources: Sources, device_name: str = "host", file: str | None = None) -> tuple[Mutant, ...]:
    """All mutants of kernels/, or of one file; in the order of the text. UserError for a file that does not exist."""
    names = [name for name, _ in sources.files if name.endswith((".cu", ".cuh"))]
    if file is not None and file not in names:
        raise UserError(f"no kernel file '{file}' to mutate; there are {', '.join(names)}")
    found = set()
    for name in names if file is None else [file]:
        code = mask(sources.text(name), cuda=device_name == "cuda")
        for operator, edits in OPERATORS.items():
            found |= {Mutant(name, start, end, operator, new) for start, end, new in edits(code)}
    return tuple(sorted(found))


def sample(mutants: Sequence[Mutant], count: int, seed: int) -> tuple[Mutant, ...]:
    """`count` of them, taken in turn from every file and operator, chosen by seed; in the order of the text."""
    chance = random.Random(seed)  # noqa: S311  a sample, no secret
    groups: dict[tuple[str, str], list[Mutant]] = {}
    for mutant in mutants:
        groups.setdefault((mutant.file, mutant.operator), []).append(mutant)
    for group in groups.values():
        chance.shuffle(group)
    turns = sorted(groups)
    chance.shuffle(turns)
    chosen: list[Mutant] = []
    while len(chosen) < min(count, len(mutants)):
        for key in turns:
            if groups[key] and len(chosen) < count:
                chosen.append(groups[key].pop())
    return tuple(sorted(chosen))


# ---------------------------------------------------------------------------------------------- what is code

_NO_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
_PREPROCESSOR = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)
_APART = re.compile(r"\b(?:static_assert|__launch_bounds__|__align__|alignas|asm volatile)\s*\(")


def mask(text: str, *, cuda: bool) -> str:
    """The text, as long as it was, with blanks for everything that is not to be mutated."""
    code = _blank(_NO_CODE, text)
    code = _without_other_device(code, cuda=cuda)
    code = _blank(_PREPROCESSOR, code)
    for match in list(_APART.finditer(code)):
        end = _closing(code, match.end() - 1)
        code = code[: match.start()] + " " * (end + 1 - match.start()) + code[end + 1 :]
    return code


def _blank(pattern: re.Pattern[str], text: str) -> str:
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def _without_other_device(code: str, *, cuda: bool) -> str:
    """Blanks for the branches of `#ifdef __CUDACC__` that are not mutated.

    A GPU's compiler does not see the other branch; on the host that is all there is, but it stands in for a GPU's
    instructions and is no part of a kernel: neither is.
    """
    lines = code.split("\n")
    seen: list[bool | None] = []  # one entry an open #if: whether its present branch is; None: neither
    for i, line in enumerate(lines):
        word = line.strip().replace("# ", "#")
        if word.startswith("#if"):
            about_cuda = "__CUDACC__" in word
            seen.append((not word.startswith(("#ifndef", "#if !")) if cuda else None) if about_cuda else True)
        elif word.startswith("#else") and seen:
            seen[-1] = None if seen[-1] is None else not seen[-1]
        elif word.startswith("#endif") and seen:
            seen.pop()
        elif not all(seen):
            lines[i] = " " * len(line)
    return "\n".join(lines)


_PAIRS = {"(": ")", "[": "]", "{": "}"}


def _closing(code: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes; the end of the text where it does not."""
    depth = 0
    for i in range(opening, len(code)):
        depth += (code[i] in _PAIRS) - (code[i] in _PAIRS.values())
        if depth == 0:
            return i
    return len(code) - 1


def _opening(code: str, closing: int) -> int:
    depth = 0
    for i in range(closing, -1, -1):
        depth += (code[i] in _PAIRS.values()) - (code[i] in _PAIRS)
        if depth == 0:
            return i
    return 0


# ---------------------------------------------------------------------------------------------- operators

_DECLARATION = re.compile(
    r"\s*(?:(?:__shared__|constexpr|static|const|struct \w+ \{)\s+)*(?!return\b|else\b|case\b|delete\b)"
    r"(?:std::)?[A-Za-z_]\w*(?:<[^;=()]*>)?(?:\s*[*&])*\s+[*&]?\w+\s*\["
)
_KEYWORDS = {"if", "for", "while", "switch", "return", "sizeof", "defined", "operator", "constexpr", "template"}
_COMMUTATIVE = {"__fadd_rn", "__fmul_rn", "__fmaf_rn", "min", "max"}


def _exchange(pattern: str, table: Mapping[str, tuple[str, ...]]) -> Callable[[str], Iterator[Edit]]:
    """Edits that put something else where the pattern's group 1 matches."""
    compiled = re.compile(pattern)

    def edits(code: str) -> Iterator[Edit]:
        for match in compiled.finditer(code):
            for new in table[match.group(1)]:
                yield match.start(1), match.end(1), new

    return edits


def _constants(code: str) -> Iterator[Edit]:
    for match in re.finditer(r"(?<![\w.])(0x[0-9a-fA-F]+|\d+)(u|ll|ull)?(?![\w.])", code):
        if re.search(r"(<<|>>) $", code[: match.start()]) or _in_declared_size(code, match.start()):
            continue
        value, suffix = int(match.group(1), 0), match.group(2) or ""
        for other in (value + 1, value - 1):
            if other >= 0:
                yield match.start(), match.end(), f"{other:#x}{suffix}" if "x" in match.group(1) else f"{other}{suffix}"
    for match in re.finditer(r"(?<![\w.])\d+\.\d*(?:e[+-]?\d+)?f\b", code):
        yield match.start(), match.end(), f"({match.group()} + 1.0f)"


def _shifts(code: str) -> Iterator[Edit]:
    for match in re.finditer(r"(?<= )(?:<<|>>) (\d+)\b", code):
        for other in (int(match.group(1)) + 1, int(match.group(1)) - 1):
            if other >= 0:
                yield match.start(1), match.end(1), str(other)
    for match in re.finditer(r"(?<= )(<<|>>)(?= )", code):
        yield match.start(), match.end(), {"<<": ">>", ">>": "<<"}[match.group()]


def _indices(code: str) -> Iterator[Edit]:
    for match in re.finditer(r"(?<=[\w)\]])\[", code):
        end = _closing(code, match.start())
        inside = code[match.end() : end]
        if inside.strip() and not _in_declared_size(code, match.end()):
            yield match.end(), end, f"({inside}) + 1"


def _in_declared_size(code: str, place: int) -> bool:
    """Whether a place lies in the brackets of a declaration, as 32 does in `float sums[32], other[8]`."""
    begin = max(code.rfind(sign, 0, place) for sign in ";{}") + 1
    statement = code[begin:place]
    if statement.count("[") <= statement.count("]") or "=" in statement:
        return False
    if re.search(r"\(\*\w+\)\s*(?:\[[^\]]*\]\s*)*\[[^\]]*$", statement):  # pointer to an array
        return True
    return _DECLARATION.match(statement) is not None


def _barriers(code: str) -> Iterator[Edit]:
    for match in re.finditer(r"__sync(?:threads|warp)\(\)", code):
        yield match.start(), match.end(), "(void)0"


def _operand_before(code: str, place: int) -> int:
    """Where the operand that ends at `place` begins."""
    i = place
    while i > 0:
        last = code[i - 1]
        if last in ")]":
            i = _opening(code, i - 1)
        elif last == ">" and i < len(code) and code[i] == "(" and "<" in code[:i]:  # static_cast<float>(
            i = code.rfind("<", 0, i)
        elif last.isalnum() or last in "_.:":
            i -= 1
        else:
            break
    return i


def _operand_after(code: str, place: int) -> int:
    """Where the operand that begins at `place` ends."""
    i = place
    while i < len(code) and code[i] in "*&-!~":
        i += 1
    while i < len(code):
        cast = re.match(r"<[\w:* ]+>(?=\()", code[i:])
        if code[i] in "([":
            i = _closing(code, i) + 1
        elif cast:
            i += cast.end()
        elif code[i].isalnum() or code[i] in "_.:":
            i += 1
        else:
            break
    return i


def _swapped_operands(code: str) -> Iterator[Edit]:
    for match in re.finditer(r" ([-/]) ", code):
        begin, end = _operand_before(code, match.start()), _operand_after(code, match.end())
        left, right = code[begin : match.start()], code[match.end() : end]
        if left and right and left != right and "\n" not in left + right:
            yield begin, end, f"{right} {match.group(1)} {left}"


def _swapped_arguments(code: str) -> Iterator[Edit]:
    for match in re.finditer(r"\b([A-Za-z_]\w*)(?:<[\w:, ]*>)?\(", code):
        if match.group(1) in _KEYWORDS | _COMMUTATIVE or _is_declared(code, match.start()):
            continue
        arguments = _arguments(code, match.end() - 1)
        if len(arguments) > 1:
            (a, b), (c, d) = arguments[:2]
            if code[a:b] != code[c:d]:
                yield a, d, code[c:d] + code[b:c] + code[a:b]


def _is_declared(code: str, name: int) -> bool:
    """Whether the name is declared here and not called: a type stands before it."""
    before = code[:name].rstrip()
    word = re.search(r"(\w+)$", before)
    if word:
        return word.group(1) not in {"return", "else", "case"}
    return bool(re.search(r"[\w>][*&]+$|>$", before)) and not before.endswith("->")


def _arguments(code: str, opening: int) -> list[tuple[int, int]]:
    """The places of a call's arguments, without the blanks around them."""
    places, depth, begin = [], 0, opening + 1
    for i in range(opening, _closing(code, opening) + 1):
        if code[i] in _PAIRS:
            depth += 1
        elif code[i] in _PAIRS.values():
            depth -= 1
        if (code[i] == "," and depth == 1) or depth == 0:
            text = code[begin:i]
            places.append((begin + len(text) - len(text.lstrip()), begin + len(text.rstrip())))
            begin = i + 1
    return [(a, b) for a, b in places if a < b]


def _guards(code: str) -> Iterator[Edit]:
    for match in re.finditer(r"\bif \(", code):
        opening = match.end() - 1
        end = _closing(code, opening)
        leaves = re.match(r"\s*(?:return|continue|break)\b", code[end + 1 :])
        condition = code[opening + 1 : end]
        yield opening + 1, end, f"false && ({condition})" if leaves else f"true || ({condition})"
    for match in re.finditer(r"(?<= )\?(?= )", code):
        yield match.start(), match.end(), "|| true ?"
        yield match.start(), match.end(), "&& false ?"


_BINARY = r"(?<=[\w)\]] )"
OPERATORS: dict[str, Callable[[str], Iterator[Edit]]] = {
    "comparison": _exchange(
        _BINARY + r"(<=|>=|==|!=|<|>)(?= )",
        {"<": ("<=",), "<=": ("<",), ">": (">=",), ">=": (">",), "==": ("!=",), "!=": ("==",)},
    ),
    "arithmetic": _exchange(
        _BINARY + r"([-+*/%]|\+=|-=|\*=|/=)(?= )",
        {"+": ("-",), "-": ("+",), "*": ("+",), "/": ("*",), "%": ("/",)}
        | {"+=": ("-=",), "-=": ("+=",), "*=": ("+=",), "/=": ("*=",)},
    ),
    "intrinsic": _exchange(
        r"\b(__fadd_rn|__fsub_rn|__fmul_rn|__fdiv_rn)\b",
        {"__fadd_rn": ("__fsub_rn",), "__fsub_rn": ("__fadd_rn",)}
        | {"__fmul_rn": ("__fadd_rn",), "__fdiv_rn": ("__fmul_rn",)},
    ),
    "logic": _exchange(_BINARY + r"(&&|\|\|)(?= )", {"&&": ("||",), "||": ("&&",)}),
    "shift": _shifts,
    "constant": _constants,
    "index": _indices,
    "barrier": _barriers,
    "swapped operands": _swapped_operands,
    "swapped arguments": _swapped_arguments,
    "guard": _guards,
    "type": _exchange(
        r"\b(long long|std::uint64_t|std::uint32_t|float)\b(?= \w+ = |>\()",
        {"long long": ("int",), "std::uint64_t": ("std::uint32_t",), "std::uint32_t": ("int",), "float": ("__half",)},
    ),
}
"""Name of an operator -> the edits it makes in masked code."""
