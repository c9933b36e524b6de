"""What the paper prints: Acc in percent, Tok in tokens, Lat in seconds (Tables 1, 2, 5 to 12), and
the training data of Table 3. Data to compare with, used by reports and tests.

Lat is that of its H20 and its batches: compare ratios, never seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from asap.eval_config import BENCHMARKS, K

__all__ = ["PRINTED", "TRAINING_TOKENS", "Printed", "printed_for"]


@dataclass(frozen=True, slots=True)
class Printed:
    """One cell."""

    model: str
    """`Qwen-7B` or `Llama-8B`: the DeepSeek-R1-Distill model that was trained."""
    method: str
    benchmark: str
    budget: int
    accuracy: float
    tokens: int
    latency_s: float

    @property
    def solved(self) -> int:
        """The number of tasks whose share is this accuracy."""
        return round(self.accuracy * (BENCHMARKS[self.benchmark].tasks or 0) / 100)


# Columns: HumanEval, Acc of HumanEval+ (same completions), LiveCodeBench v1_v3 and v4_v5, LeetCode.
_QWEN = """
Zero-shot: 73.78/3051/1.16 68.29 42.16/7088/3.59 25.37/8336/5.15 19.74/8680/4.95
Original: 78.05/2973/1.12 75.61 52.12/6611/3.15 30.97/8289/4.83 25.00/8485/4.72
Selective Context: 59.76/2979/1.13 54.88 30.23/7025/3.75 16.79/8558/5.35 15.79/8461/4.90
LLMLingua-2: 71.34/3075/1.19 68.29 38.89/6953/3.60 22.76/8474/5.31 17.54/8513/4.81
TokenSkip: 76.83/2823/1.07 73.78 32.35/7095/3.85 20.15/8400/5.37 18.42/8503/4.87
SPIRIT: 83.54/2764/1.07 75.61 50.82/6524/3.09 33.58/7892/4.62 25.00/8186/4.45
ASAP: 84.15/2464/0.98 78.66 54.74/5177/2.09 36.19/6035/2.61 27.63/7541/3.48
w/o coarse: 82.32/2839/1.10 78.05 53.92/6107/2.77 35.07/7735/4.60 24.12/7954/3.75
w/o fine: 71.34/2897/1.10 67.07 51.14/6599/3.20 31.72/8061/4.83 25.44/8326/4.77
"""
_LLAMA = """
Zero-shot: 68.29/3334/1.86 64.02 44.12/7162/6.92 25.00/8508/8.90 27.19/8358/8.65
Original: 82.32/2978/1.63 76.22 52.61/6614/6.16 31.34/8202/8.60 26.32/8413/8.85
SPIRIT: 76.22/3159/1.74 72.56 52.61/6280/5.84 30.22/7913/8.45 26.75/8449/8.73
ASAP: 80.49/2494/1.30 76.83 48.86/3605/2.18 32.84/4175/2.69 27.63/3792/2.42
"""
# Qwen-7B, budgets in K; columns as in SWEPT. HumanEval+ shares Tok and Lat with HumanEval.
_SWEEPS = """
humaneval 1: 10.37/1007/0.28 15.85/983/0.28 11.59/995/0.28 25.00/946/0.27
humaneval 2: 45.12/1813/0.53 44.51/1702/0.49 49.39/1690/0.49 56.71/1502/0.44
humaneval 4: 71.95/2561/0.85 67.68/2511/0.82 76.83/2401/0.80 75.00/2116/0.72
humaneval-plus 1: 9.76 14.63 10.98 23.78
humaneval-plus 2: 42.68 43.29 47.56 54.88
humaneval-plus 4: 66.46 65.85 69.51 71.34
livecodebench-v1-v3 2: 16.50/1966/0.52 17.16/1920/0.51 18.95/1908/0.51 21.57/1833/0.49
livecodebench-v1-v3 4: 32.68/3499/1.06 30.72/3432/1.05 34.80/3370/1.03 34.97/3244/1.00
livecodebench-v1-v3 6: 39.05/4806/1.70 42.65/4673/1.67 43.14/4605/1.64 46.24/4358/1.54
livecodebench-v1-v3 8: 44.28/5903/2.46 47.71/5723/2.43 51.80/5515/2.27 52.61/4919/1.90
livecodebench-v1-v3 12: 43.95/7988/5.10 54.41/7473/4.22 51.63/7362/4.09 55.56/5322/2.27
livecodebench-v4-v5 2: 6.72/2021/0.59 6.34/1999/0.57 8.21/1993/0.56 13.43/1930/0.54
livecodebench-v4-v5 4: 16.79/3820/1.22 15.67/3799/1.20 20.15/3712/1.18 20.90/3594/1.15
livecodebench-v4-v5 6: 23.13/5444/2.07 22.76/5397/2.00 26.49/5237/1.93 30.60/4988/1.85
livecodebench-v4-v5 8: 25.37/6927/3.27 25.74/6882/3.24 30.60/6634/3.09 35.07/5793/2.38
livecodebench-v4-v5 12: 25.75/9706/7.44 32.46/9567/7.10 34.33/8987/6.73 36.57/6128/2.76
leetcode 2: 7.02/2028/0.53 6.14/2020/0.53 7.02/2001/0.53 10.09/1965/0.53
leetcode 4: 13.16/3848/1.21 13.16/3854/1.21 16.23/3789/1.19 15.79/3758/1.19
leetcode 6: 16.23/5553/2.04 16.67/5548/2.04 18.86/5407/2.00 19.30/5387/2.00
leetcode 8: 19.30/7165/3.27 22.37/7104/3.18 22.37/6882/3.04 23.25/6722/2.88
leetcode 12: 21.49/10142/7.58 28.07/9717/7.09 26.32/9354/6.86 27.63/7902/3.83
"""
SWEPT = ("Zero-shot", "Original", "SPIRIT", "ASAP")
_COLUMNS = tuple(name for name in BENCHMARKS if name != "mbpp-plus")

TRAINING_TOKENS = {
    "Original": (13023, 80.11),
    "Selective Context": (6722, 63.41),
    "LLMLingua-2": (6919, 65.25),
    "TokenSkip": (9813, 77.27),
    "SPIRIT": (6082, 57.45),
    "ASAP": (3178, 31.48),
}
"""Table 3: mean tokens of a training sample, and seconds of a training step."""


def _lines(text: str) -> Iterator[tuple[str, list[str]]]:
    for line in text.strip().splitlines():
        head, _, cells = line.partition(": ")
        yield head, cells.split()


def _cell(model: str, method: str, benchmark: str, budget: int, text: str) -> Printed:
    accuracy, tokens, latency = text.split("/")
    return Printed(model, method, benchmark, budget, float(accuracy), int(tokens), float(latency))


def _main(model: str, text: str) -> Iterator[Printed]:
    for method, cells in _lines(text):
        cells[1] += cells[0][cells[0].index("/") :]
        for benchmark, cell in zip(_COLUMNS, cells, strict=True):
            yield _cell(model, method, benchmark, BENCHMARKS[benchmark].budget, cell)


def _sweeps(model: str, text: str) -> Iterator[Printed]:
    human: dict[tuple[str, str], str] = {}
    for head, cells in _lines(text):
        benchmark, thousands = head.split()
        for method, cell in zip(SWEPT, cells, strict=True):
            if benchmark == "humaneval":
                human[method, thousands] = cell[cell.index("/") :]
            full = cell if "/" in cell else cell + human[method, thousands]
            yield _cell(model, method, benchmark, K * int(thousands), full)


PRINTED: tuple[Printed, ...] = (
    *_main("Qwen-7B", _QWEN),
    *_main("Llama-8B", _LLAMA),
    *_sweeps("Qwen-7B", _SWEEPS),
)


def printed_for(benchmark: str) -> list[Printed]:
    """What the paper prints for a benchmark, by model, method and budget; empty for others."""
    found = [cell for cell in PRINTED if cell.benchmark == benchmark]
    return sorted(found, key=lambda cell: (cell.model, cell.method, cell.budget))
