"""An analysis of made-up numbers, for tests of what is done with one."""

from __future__ import annotations

import math
import random
from dataclasses import replace

from nvfp4c.sensitivity.analysis import Analysis, Candidate, Key, Together
from nvfp4c.sensitivity.measurements import OCTAVES, Measurements, OperandMeasure, RoleMeasure, SiteMeasure

PROJECTIONS = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.o_proj", "mlp.up_proj", "mlp.down_proj")
READS = (0, 0, 0, 1, 2, 3)
"""Which tensor of the block each projection reads."""

OPERANDS = {"fprop": ("x", "w"), "dgrad": ("dy", "w"), "wgrad": ("dy", "x")}
EVIL = "</script><img src=x onerror=\"document.title='broken'\"><b>$data"
TOKENS, WIDTH = 512, 256


def operand_of(name: str, elements: int, noise: float, draw: random.Random) -> OperandMeasure:
    weights = [math.exp(-((octave - 3.5) ** 2) / 6) for octave in range(OCTAVES)]
    before = [round(elements * weight / sum(weights)) for weight in weights]
    vanished = sum(before[7:])
    after = [*before[:7], *[0] * (OCTAVES - 7)]
    scales = [round(elements / 16 * weight) for weight in (0.001, *[0.02] * 6, *[0.08] * 6, 0.2, 0.15, 0.029)]
    return OperandMeasure(
        operand=name,
        elements=elements,
        signal=float(elements),
        noise=noise * elements,
        fourth=elements * draw.uniform(3, 40 if name == "x" else 6),
        vanished=vanished,
        saturated=round(elements * draw.uniform(0, 1e-3)),
        zeros=0,
        before=tuple(before),
        after=tuple(after),
        scales=tuple(scales),
    )


def role_of(role: str, m: int, n: int, k: int, scale: float, draw: random.Random) -> RoleMeasure:
    noise = 0.015 * scale * draw.uniform(0.7, 1.5)
    effect = dict(first=2e-4, first_error=3e-5, diagonal=noise * 1e-5, rows=noise * 1e-2, samples=noise * 2e-2)
    return RoleMeasure(
        role=role,
        m=m,
        n=n,
        k=k,
        operations=2.0 * m * n * k,
        signal=1e4,
        noise=noise * 1e4,
        aligned=-1e4 * noise / 10,
        operands=tuple(operand_of(name, m * k, 0.009 * scale, draw) for name in OPERANDS[role]),
        **(effect if role == "fprop" else {}),
    )


def site_of(name: str, block: int | None, projection: str, reads: int, weight: str, draw: random.Random) -> SiteMeasure:
    n, k = {"mlp.up_proj": (4 * WIDTH, WIDTH), "mlp.down_proj": (WIDTH, 4 * WIDTH)}.get(projection, (WIDTH, WIDTH))
    scale = 4.0 if projection == "mlp.down_proj" or block is None else 1.0
    sizes = {"fprop": (TOKENS, n, k), "dgrad": (TOKENS, k, n), "wgrad": (n, k, TOKENS)}
    roles = {role: role_of(role, *size, scale, draw) for role, size in sizes.items()}
    return SiteMeasure(name, block, projection, weight, n * k, reads, roles)


def analysis_of(blocks: int = 6) -> Analysis:
    """Made-up numbers of a plausible size: down projections and the head suffer most, as they do in fact."""
    draw = random.Random(0)
    sites = [
        site_of(f"layers.{block}.{name}", block, name, 4 * block + reads, f"layers.{block}.{name}.weight", draw)
        for block in range(blocks)
        for name, reads in zip(PROJECTIONS, READS, strict=True)
    ]
    sites.append(site_of("lm_head", None, "lm_head", 4 * blocks, "embed.weight", draw))
    sites.append(SiteMeasure("router", None, "router", "embed.weight", 3, 4 * blocks, {}, "K is 3, no multiple of 16"))
    scores = {
        (site.site, role): measure.noise / measure.signal * draw.uniform(0.02, 0.5) ** 2
        for site in sites
        for role, measure in site.roles.items()
    }
    provenance = {"model": "a GPT of 6 blocks", "data": "text, SHA-256 0123abcd", "versions": {"torch": "2.13.0"}}
    measurements = Measurements(tuple(sites), 3.2145, 8, provenance)
    return Analysis(measurements, scores, candidates_of(measurements, scores, draw), "solved 0.15")


def candidates_of(measurements: Measurements, scores: dict[Key, float], draw: random.Random) -> tuple[Candidate, ...]:
    operations = {
        (site.site, role.role): role.operations for site in measurements.sites for role in site.roles.values()
    }
    total = sum(operations.values())
    ranked = {
        "solved": sorted(scores, key=lambda key: -scores[key] / operations[key]),
        "paper": [key for key in scores if key[0].startswith("layers.0.")] + list(scores)[::-1],
        "weights": sorted(scores, key=lambda key: -operations[key]),
        "random": draw.sample(list(scores), len(scores)),
    }

    def candidate(kind: str, budget: float, run: bool) -> Candidate:
        kept: list[Key] = []
        for key in dict.fromkeys(ranked[kind]):
            if sum(operations[one] for one in (*kept, key)) <= budget * total:
                kept.append(key)
        share = sum(operations[key] for key in kept) / total
        predicted = sum(scores[key] for key in scores if key not in kept)
        measured = tuple(predicted * draw.gauss(1.05, 0.12) for _ in range(8)) if run else None
        return Candidate(f"{kind} {budget:g}", kind, tuple(kept), budget, share, predicted, measured)

    curve = [candidate("solved", budget, budget in (0.05, 0.15)) for budget in (0, 0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 1)]
    return (*curve, *(candidate(kind, 0.15, True) for kind in ("paper", "weights", "random")))


def with_evil(analysis: Analysis) -> Analysis:
    """The same with markup in every text, and with numbers that are not finite."""
    first, second, *others = analysis.measurements.sites
    renamed = replace(first, site=f"layers.0.{EVIL}", projection=EVIL, weight=EVIL)
    broken = replace(second.roles["fprop"], noise=math.nan, signal=math.inf, first=math.nan)
    second = replace(second, roles={**second.roles, "fprop": broken})
    others[-1] = replace(others[-1], obstacle=EVIL)
    measurements = replace(
        analysis.measurements, sites=(renamed, second, *others), provenance={EVIL: EVIL, "list": [EVIL, 1]}
    )
    scores = {
        (renamed.site if site == first.site else site, role): value for (site, role), value in analysis.scores.items()
    }
    scores[second.site, "fprop"] = math.nan
    candidates = [replace(one, bf16=tuple(key for key in one.bf16 if key in scores)) for one in analysis.candidates]
    candidates.append(Candidate(EVIL, "random", (), 0.15, 0.0, math.inf, (1.0, math.nan)))
    key = (renamed.site, "fprop")
    return Analysis(
        measurements,
        scores,
        tuple(candidates),
        EVIL,
        "speed",
        EVIL,
        single={key: math.inf},
        cosine={key: math.nan},
        together=(Together(EVIL, (key,), math.nan, (math.inf, 1.0)),),
        pairs={(key, key): math.nan},
    )
