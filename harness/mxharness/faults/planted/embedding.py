"""Faults of embeddings."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, FunctionChange, KernelChange

FAULTS = (
    Fault(
        name="embedding-row-off-by-one",
        seen_in="any gather written for ids that begin at 1",
        symptom="fluent text about something else: every token has its neighbour's embedding",
        change=KernelChange("embedding.cu", "table.read(values, id, k, K);", "table.read(values, (id + 1) % V, k, K);"),
        op="embedding_lookup",
        detector="exact",
    ),
    Fault(
        name="embedding-blocks-straddle-rows",
        seen_in="DeepWok/mase PR 321",
        symptom="wrong from the second row on where K is not a multiple of 32: rows are taken to lie K/32 blocks apart",
        change=KernelChange(
            "embedding.cu",
            "const int blocks = (K + MX_BLOCK - 1) / MX_BLOCK;",
            "const int blocks = max(K / MX_BLOCK, 1);",
        ),
        op="embedding_lookup",
        detector="exact",
    ),
    Fault(
        name="padding-id-ignored",
        seen_in="any lookup whose cached path forgets what the decoding path knows",
        symptom="padding tokens have the embedding of a word",
        change=FunctionChange(
            "mxharness.functional.embedding",
            "embedding_lookup_cached",
            "_lookup(device, y, ids, padding_id, V,",
            "_lookup(device, y, ids, None, V,",
        ),
        op="embedding_lookup_cached",
        detector="exact",
        pattern="id 18 alone",
    ),
    Fault(
        name="batch-of-ids-read-as-32-bit",
        seen_in="kernels that take int32 ids and are given torch's int64",
        symptom="every second token is token 0",
        change=KernelChange("embedding.cu", "return wide ? static_cast", "return false ? static_cast"),
        op="embedding_lookup_batch",
        detector="exact",
    ),
    Fault(
        name="position-off-by-one",
        seen_in="positions that begin at 1, or at 2 as in OPT and BART",
        symptom="quality falls quietly: every token has its successor's position",
        change=KernelChange(
            "embedding.cu", "position = first + row % span;", "position = min(first + row % span + 1, P - 1);"
        ),
        op="add_position_embeddings",
        detector="exact",
        pattern="tokens up to 4",
    ),
    Fault(
        name="position-restarts-with-every-step",
        seen_in="decoding with a key-value cache that hands on no start",
        symptom="the first token of an answer is right, the others repeat",
        change=KernelChange("embedding.cu", "start + (offsets.values == nullptr ? 0 : offsets[row / span])", "start"),
        op="add_position_embeddings",
        detector="exact",
        pattern="sequences from 1 on",
    ),
)
