"""How often stated 95 % intervals hold a truth that is known: of FD, KID, recall, CLIP-like means, and accuracy.

    python eval/intervals.py --out eval/intervals.json

Features are Gaussian. The truth of FD_N and recall_N is their expectation at that N, from as many draws again as the
intervals take, of other seeds; KID's is closed form; a fraction's interval is summed over all outcomes, without draws.
The last rows show what does not hold: 1.96 standard errors of three seeds, and a bootstrap of FD over images.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from scipy.stats import binom
from torch import Tensor

from stepdistill.evaluation.intervals import Interval, paired_bootstrap, t_interval, wilson_interval
from stepdistill.evaluation.metrics import MeanCov, Moments, frechet_distance, precision_recall
from stepdistill.evaluation.mmd import kid_blocks
from stepdistill.evaluation.records import installed_versions, interval_of

DIM = 8
SCALE, SHIFT = 1.2, 0.2
"""Of the generated features; the real ones are of mean 0 and deviation 1."""


@dataclass(frozen=True)
class Arguments:
    """Simulate intervals."""

    draws: int = 2000
    """Intervals of each row."""
    out: Path | None = None
    """JSON file to write; the table in metrics.md beside it is written with it."""


@dataclass(frozen=True)
class Row:
    """How one interval did."""

    metric: str
    interval: str
    setting: str
    truth: float
    coverage: float
    """Share of intervals that hold the truth."""
    error: float
    """Standard error of the coverage; 0 where it is exact."""
    claimed: bool = True
    """False of what is shown to fail."""


def features(n: int, rng: torch.Generator, scale: float = SCALE, shift: float = SHIFT) -> Tensor:
    """Generated features (n, DIM)."""
    return scale * torch.randn(n, DIM, generator=rng, dtype=torch.float64) + shift


def row(metric: str, interval: str, setting: str, truth: float, found: Iterator[Interval], claimed: bool = True) -> Row:
    """Count the intervals that hold the truth."""
    hits = torch.tensor([i.low <= truth <= i.high for i in found]).double()
    return Row(metric, interval, setting, truth, float(hits.mean()), float(hits.std()) / math.sqrt(len(hits)), claimed)


def over_seeds(metric: str, measure: Callable[[torch.Generator], float], setting: str, draws: int) -> list[Row]:
    """Student-t intervals over two, three and five seeds, and 1.96 standard errors over three."""
    rng = torch.Generator().manual_seed(0)
    values = torch.tensor([measure(rng) for _ in range(5 * draws)], dtype=torch.float64).view(draws, 5)
    truth = float(torch.tensor([measure(rng) for _ in range(5 * draws)]).double().mean())
    rows = [
        row(metric, "Student t over seeds", f"{setting}, {m} seeds", truth, map(t_interval, values[:, :m]))
        for m in (2, 3, 5)
    ]
    rows.append(
        row(metric, "1.96 s.e. over seeds", f"{setting}, 3 seeds", truth, map(normal, values[:, :3]), claimed=False)
    )
    return rows


def normal(values: Tensor) -> Interval:
    """The interval that takes the spread of few values for known."""
    half, mean = 1.96 * float(values.std()) / math.sqrt(len(values)), float(values.mean())
    return Interval(mean, mean - half, mean + half, "student-t", len(values))


def frechet_rows(draws: int, n: int = 200) -> list[Row]:
    """FD of n samples against known statistics, over seeds; and its bootstrap over images."""
    real = Moments(torch.zeros(DIM).double(), torch.eye(DIM).double())

    def measure(rng: torch.Generator) -> float:
        return frechet_distance(real, MeanCov.of(features(n, rng)))

    rows = over_seeds("FD", measure, f"N = {n}, D = {DIM}", draws)

    def over_images() -> Iterator[Interval]:
        rng = torch.Generator().manual_seed(1)
        for _ in range(max(20, draws // 50)):
            bank = features(n, rng)
            again = (bank[torch.randint(n, (n,), generator=rng)] for _ in range(100))
            found = torch.tensor([frechet_distance(real, MeanCov.of(b)) for b in again]).double()
            low, high = found.quantile(torch.tensor([0.025, 0.975]).double()).tolist()
            yield Interval(float(found.mean()), low, high, "bootstrap", n)

    rows.append(row("FD", "bootstrap over images", f"N = {n}, D = {DIM}", rows[0].truth, over_images(), claimed=False))
    return rows


def neighbour_rows(draws: int, n: int = 150, k: int = 3) -> list[Row]:
    """Recall and precision of n samples against one bank of real ones, under the rules of ``records.interval_of``."""
    real = features(n, torch.Generator().manual_seed(2), 1.0, 0.0)

    def measured(share: str, scale: float) -> Tensor:
        rng = torch.Generator().manual_seed(0)
        found = (getattr(precision_recall(real, features(n, rng, scale, 0.0), k), share) for _ in range(10 * draws))
        return torch.tensor(list(found), dtype=torch.float64)

    setting, rows = f"N = {n}, D = {DIM}, k = {k}", []
    for metric, rule, scale, counts in (
        ("recall", "Student t over seeds, floor 0 of n", 0.75, (2, 3, 5)),
        ("precision", "Wilson over images", SCALE, (1, 3)),
    ):
        shares = measured(metric, scale)
        for m in counts:
            name = f"{setting}, {m} seed{'s' * (m > 1)}"
            rows.append(counted(metric, rule, name, shares, m, draws, n))
    return rows


def counted(metric: str, rule: str, setting: str, shares: Tensor, seeds: int, draws: int, items: int) -> Row:
    """Intervals that records get, of the first half of ``shares`` in groups of seeds; the other half is the truth."""

    def intervals() -> Iterator[Interval]:
        for values in (100 * shares[: 5 * draws]).view(draws, 5)[:, :seeds].tolist():
            mean, half = interval_of(metric, values, items)
            yield Interval(mean / 100, (mean - half) / 100, (mean + half) / 100, "wilson", items)

    return row(metric, rule, setting, float(shares[5 * draws :].mean()), intervals())


def kid_truth(scale: float, shift: float) -> float:
    """Squared MMD of N(0, I) and N(shift, scale^2 I) under ``(x.y / D + 1)^3``, by moments up to the third."""
    eye = torch.eye(DIM, dtype=torch.float64)

    def moments(mean: Tensor, var: float) -> tuple[Tensor, Tensor, Tensor]:
        spread = torch.einsum("i,jk->ijk", mean, var * eye)
        third = torch.einsum("i,j,k->ijk", mean, mean, mean) + spread + spread.movedim(0, 1) + spread.movedim(0, 2)
        return mean, torch.outer(mean, mean) + var * eye, third

    def kernel(a: tuple[Tensor, Tensor, Tensor], b: tuple[Tensor, Tensor, Tensor]) -> float:
        first, second, third = (float((x * y).sum()) for x, y in zip(a, b, strict=True))
        return 1 + 3 * first / DIM + 3 * second / DIM**2 + third / DIM**3

    real, fake = moments(torch.zeros(DIM).double(), 1.0), moments(torch.full((DIM,), shift).double(), scale**2)
    return kernel(real, real) + kernel(fake, fake) - 2 * kernel(real, fake)


def kid_rows(draws: int, n: int = 300) -> list[Row]:
    """KID of n samples, intervals over ten disjoint blocks: of different and of equal distributions."""
    rows = []
    for scale, shift in ((SCALE, SHIFT), (1.0, 0.0)):
        rng = torch.Generator().manual_seed(3)
        found = (
            t_interval(kid_blocks(features(n, rng, 1.0, 0.0), features(n, rng, scale, shift), seed=i))
            for i in range(draws)
        )
        setting = f"N = {n}, D = {DIM}, 10 blocks, {'different' if shift else 'equal'} distributions"
        rows.append(row("KID", "Student t over blocks", setting, kid_truth(scale, shift), found))
    return rows


def accuracy_rows() -> list[Row]:
    """Wilson's interval, summed over all outcomes: mean and lowest over fractions near the one named."""
    rows = []
    for n in (200, 1000, 5000):
        for p in (0.5, 0.9, 0.98):
            near = [p + d * (1 - p) / 100 for d in range(-10, 11)]
            shares = []
            for q in near:
                held = [k for k in range(n + 1) if (w := wilson_interval(k, n)).low <= q <= w.high]
                shares.append(float(binom.pmf(held, n, q).sum()))
            setting = f"n = {n}, p near {p} (lowest {100 * min(shares):.1f} %)"
            rows.append(Row("accuracy", "Wilson", setting, p, sum(shares) / len(shares), 0.0))
    return rows


def prompt_rows(draws: int) -> list[Row]:
    """The paired bootstrap of A minus B over prompts of skewed difficulty."""
    rows = []
    for prompts in (30, 200):
        rng = torch.Generator().manual_seed(4)

        def compared(count: int = prompts, rng: torch.Generator = rng) -> Iterator[Interval]:
            for i in range(draws):
                difficulty = torch.rand(count, generator=rng).double().log()
                a, b = (difficulty + 0.3 * torch.randn(count, generator=rng) for _ in range(2))
                yield paired_bootstrap(a + 0.1, b, seed=i).difference

        rows.append(row("mean over prompts", "paired bootstrap", f"{prompts} prompts", 0.1, compared()))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as Markdown; those that are not claimed come last."""
    lines = ["| metric | interval | setting | holds the truth |", "| --- | --- | --- | ---: |"]
    for r in sorted(rows, key=lambda r: not r.claimed):
        name = r.metric if r.claimed else f"{r.metric}, not to be used"
        shown = f"{100 * r.coverage:.1f}" if not r.error else f"{100 * r.coverage:.0f} ± {math.ceil(196 * r.error)}"
        lines.append(f"| {name} | {r.interval} | {r.setting} | {shown} % |")
    return "\n".join(lines) + "\n"


def main(given: Arguments) -> None:
    """Simulate, print and write."""
    torch.set_num_threads(1)
    rows = [*frechet_rows(given.draws), *neighbour_rows(given.draws), *kid_rows(given.draws), *accuracy_rows()]
    rows += prompt_rows(max(20, given.draws // 4))
    for r in rows:
        print(f"{r.metric:18s} {r.interval:22s} {r.setting:50s} {100 * r.coverage:6.2f} % ± {196 * r.error:.2f}")
    if given.out:
        stored = {"versions": installed_versions(), "draws": given.draws, "rows": [asdict(r) for r in rows]}
        given.out.write_text(json.dumps(stored, indent=1) + "\n")
        page = given.out.with_name("metrics.md")
        head, _, rest = page.read_text().partition("<!-- coverage:begin -->\n")
        page.write_text(f"{head}<!-- coverage:begin -->\n{table(rows)}{rest[rest.index('<!-- coverage:end -->') :]}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
