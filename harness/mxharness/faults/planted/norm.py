"""Faults of norms."""

from __future__ import annotations

from mxharness.faults.planted.fault import Fault, KernelChange

FAULTS: tuple[Fault, ...] = (
    Fault(
        name="norm-without-eps",
        seen_in="generic",
        symptom="right for ordinary rows, far too large for small ones: eps is not added",
        change=KernelChange("norm.cu", "rsqrt32(__fadd_rn(square, eps))", "rsqrt32(square)"),
        op="rms_norm",
        detector="bound",
    ),
    Fault(
        name="norm-of-the-padded-count",
        seen_in="generic",
        symptom="wrong when K is not a multiple of 32: the mean divides by the padded length",
        change=KernelChange("norm.cu", "static_cast<float>(row.K)", "static_cast<float>((row.K + 31) / 32 * 32)"),
        op="rms_norm",
        detector="bound",
    ),
    Fault(
        name="norm-drops-the-tail",
        seen_in="generic",
        symptom="the last elements of a row are missing from its sum when K is not a multiple of the block",
        change=KernelChange(
            "norm.cu",
            "for (int k = threadIdx.x; k < row.K; k += THREADS) total",
            "for (int k = threadIdx.x; k < max(row.K / THREADS, 1) * THREADS && k < row.K; k += THREADS) total",
        ),
        op="layer_norm",
        detector="bound",
    ),
    Fault(
        name="variance-in-one-pass",
        seen_in="generic",
        symptom="inexact where the mean is far from zero: the mean square less the squared mean cancels",
        change=KernelChange(
            "norm.cu",
            "        const float distance = __fsub_rn(s, centre);\n"
            "        return __fmul_rn(distance, distance);\n"
            "    });\n",
            "        return __fmul_rn(s, s);\n    }) - centre * centre;\n",
        ),
        op="layer_norm",
        detector="bound",
    ),
    Fault(
        name="residual-left-out-of-the-norm",
        seen_in="generic",
        symptom="the fused addition keeps x alone",
        change=KernelChange(
            "norm.cu", "__fadd_rn(widen(x[first + k]), widen(residual[first + k]))", "widen(x[first + k])"
        ),
        op="rms_norm",
        detector="bound",
    ),
)
