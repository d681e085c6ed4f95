"""Which inter-head attention pays: those of attention.py and family.py on the same tokens, each at its own best rate.

    python experiments/ranking.py --jobs 2

One small model (369 thousand parameters, 4 heads of 16, 600 steps of 2,048 tokens, float32), in stages that follow from
one another: `rates`, every variant at three learning rates with three seeds; `seeds`, six more at the best of them;
`time`, a training step over MHA's, in turns; `equal`, three seeds of as many steps as fit into the time of MHA's 600.
`long` takes the best four and MHA to 13M tokens of other text. Each finished run is a row of
experiments/results/ranking.json, so that the command can be repeated until it is done, on another day, too.

A variant is written as in sweep.py, e.g. mea-norm. Read family.py first.
"""

import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.report import RESULTS, ROOT, Rows, in_turns, mean_and_std, number, ratio_cell, ratio_quartiles
from experiments.report import sign_flip_p, table
from options import fail, option, parse_options, run_program, save_picture, split_list

import torch

import train
from experiments import sweep  # which enters family.py's attentions
from model import GPT, build_config

PLAIN = "mha,mea-norm,dfa-norm,tha,gated,diff2,knocking,mta-norm,collaborative,iha,dcmha,mha@2,latent@2"
NORMED = "mha+norm,gated+norm,mea,dfa,tha+norm,diff2+norm,knocking+norm,mta,collaborative+norm,iha+norm,dcmha+norm"
PAIRED = "mea_gated-norm,diff2_gated,diff2_composed"
RATES = (6e-3, 1.2e-2, 2.5e-2)
STEPS, LONG_STEPS = 600, 6400
STAGES = ("rates", "seeds", "time", "equal", "long")
SHAPE = "--preset tiny --n_embd 64 --block_size 128 --batch_size 16".split()
HOW = "--warmup_steps 50 --eval_windows 64 --threads 1 --device cpu --dtype float32".split()


def key(variant, rate, seed, steps=STEPS, text=""):
    return " | ".join(filter(None, [variant, f"{rate:g}", str(seed), str(steps), text]))


def losses(rows, variant, rate, seeds, steps=STEPS, text=""):
    """{seed: loss} of the runs that are there."""
    found = {seed: rows.get(key(variant, rate, seed, steps, text)) for seed in seeds}
    return {seed: math.inf if row["loss"] is None else row["loss"] for seed, row in found.items() if row}


def best_rate(rows, variant):
    """The rate with the lowest mean over seeds 0 to 2, or None as long as one of their runs is missing."""
    ends = {rate: losses(rows, variant, rate, range(3)) for rate in RATES}
    if any(len(end) < 3 for end in ends.values()):
        return None
    return min(RATES, key=lambda rate: statistics.mean(ends[rate].values()))


def equal_steps(rows, variant):
    """The steps that take as long as MHA's STEPS, or None where the time of one is not known."""
    row = rows.get(f"time | {variant}")
    return row and round(STEPS / row["ratio"][1])


def planned(o, rows, stage):
    """The runs (variant, rate, seed, steps, text) of a stage, as far as they follow from the rows."""
    names = split_list(o.variants)
    if stage == "rates":
        return [(name, rate, seed, STEPS, "") for seed in range(3) for name in names for rate in RATES]
    best = {name: best_rate(rows, name) for name in names}
    known = [name for name in names if best[name]]
    if stage == "seeds":
        return [(name, best[name], seed, STEPS, "") for seed in range(3, 9) for name in known]
    if stage == "equal":
        steps = {name: equal_steps(rows, name) for name in known}
        return [(n, best[n], seed, steps[n], "") for seed in range(3) for n in known if steps[n] not in (None, STEPS)]
    ranked = sorted(known, key=lambda name: statistics.mean(losses(rows, name, best[name], range(9)).values()))
    chosen = dict.fromkeys(["mha", *[name for name in ranked if name != "mha"][:4]])
    return [(n, best[n], seed, LONG_STEPS, o.long_data) for seed in range(3) for n in chosen if best.get(n)]


def built(variant):
    """The model of a variant, with a vocabulary of 2,048."""
    o, _ = parse_options(train.Options, [*sweep.variant_options(variant), *SHAPE], train.PRESETS)
    return GPT(build_config(o, vocab_size=2048))


def time_steps(variants, rounds=15):
    """{variant: row}: quartiles of a training step's time over MHA's, all variants in turns, on one thread."""
    torch.set_num_threads(1)
    x, jobs, rows = torch.randint(2048, (16, 129)), {}, {}
    for variant in dict.fromkeys(["mha", *variants]):
        model = built(variant)
        rows[variant] = dict(parameters=model.n_params(), cached_bytes=model.config.kv_bytes_per_token())

        def step(model=model, optimizer=train.make_optimizer(model.parameter_groups(0.1), 1e-3)):
            began = time.perf_counter()
            model(x[:, :-1], x[:, 1:].contiguous())[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - began

        jobs[variant] = step
    seconds = in_turns(jobs, rounds)
    return {name: row | dict(ratio=ratio_quartiles(seconds[name], seconds["mha"])) for name, row in rows.items()}


def run_stage(o, rows, stage):
    """Make the rows of a stage that are missing, `jobs` at a time; a run that diverged has no loss."""
    names, runs = {}, {}
    for variant, rate, seed, steps, text in planned(o, rows, stage):
        if (name := key(variant, rate, seed, steps, text)) not in rows:
            parts = [variant, f"lr{rate:g}", f"seed{seed}", str(steps), Path(text).name]
            folder = ROOT / o.out_dir / "-".join(filter(None, parts))
            how = ["--learning_rate", rate, "--seed", seed, "--max_steps", steps, "--eval_every", steps]
            how += ["--save_every", max(steps // 8, 1), *(["--data_dir", text] if text else [])]
            names[folder], runs[folder] = name, [*sweep.variant_options(variant), *SHAPE, *HOW, *map(str, how)]

    def fill():
        for folder, name in names.items():
            if (end := sweep.finished(folder)) or sweep.diverged(folder):
                rows.fill(name, lambda: dict(loss=end and end["val_loss"]))

    fill()
    sweep.run_all(runs, o.jobs, fill)


def ranking(o, rows):
    """[dict of what the table says] of the variants whose best rate is known, the lowest loss first."""
    found = []
    for variant in split_list(o.variants):
        if not (rate := best_rate(rows, variant)):
            continue
        ends, about = losses(rows, variant, rate, range(9)), rows.get(f"time | {variant}", {})
        row = dict(about, variant=variant, rate=rate, losses=ends, mean=mean_and_std(ends.values()))
        steps = equal_steps(rows, variant)
        row["equal"] = mean_and_std((losses(rows, variant, rate, range(3), steps) if steps else {}).values())
        row["long"] = losses(rows, variant, rate, range(3), LONG_STEPS, o.long_data)
        found.append(row)
    base = next((row for row in found if row["variant"] == "mha"), None)
    for row in found if base else []:
        for name in ("losses", "long"):
            paired = [loss - base[name][seed] for seed, loss in row[name].items() if seed in base[name]]
            paired = [] if row is base else paired
            row[f"{name}_minus_mha"] = mean_and_std(paired)
            row[f"{name}_p"] = sign_flip_p(paired) if len(paired) > 1 else None
    return sorted(found, key=lambda row: row["mean"][0])


def ranking_table(found):
    cells, heads = [], ["variant", "rate", "validation loss", "minus MHA, same seed", "p", "seeds", "parameters"]
    heads += ["cached bytes a token", "time of a step", "loss in MHA's time", "after 13M tokens", "minus MHA"]
    for row in found:
        minus, long_minus = row.get("losses_minus_mha", (None, None)), row.get("long_minus_mha", (None, None))
        long, long_std = mean_and_std(row["long"].values())
        cell = [row["variant"], f"{row['rate']:g}", number(row["mean"][0], ".4f", row["mean"][1])]
        cell += [number(minus[0], "+.4f", minus[1]), number(row.get("losses_p"), ".3g"), str(len(row["losses"]))]
        cell += [number(row.get("parameters"), ","), number(row.get("cached_bytes"), ",")]
        cell += [ratio_cell(row["ratio"]) if "ratio" in row else ""]
        cell += [number(row["equal"][0], ".4f", row["equal"][1]), number(long, ".4f", long_std)]
        cells.append([*cell, number(long_minus[0], "+.4f", long_minus[1])])
    there = [column for column in range(len(heads)) if any(cell[column] for cell in cells)]  # stages that have begun
    yield from table([heads[column] for column in there], [[cell[column] for column in there] for cell in cells])
    yield from ["", "Mean ± standard deviation over seeds; p: exact sign-flip test of the paired differences."]


def rates_table(found, rows):
    """The same seeds at every rate."""
    cells = []
    for row in found:
        ends = [mean_and_std(losses(rows, row["variant"], rate, range(3)).values()) for rate in RATES]
        cells.append([row["variant"], *(number(mean, ".4f", std) for mean, std in ends)])
    yield from ["", "Seeds 0 to 2 at every rate:", "", *table(["variant", *(f"{rate:g}" for rate in RATES)], cells)]


def draw(plt, found):
    """Loss minus MHA's, by seed, against what a step costs. Bars are a standard error, and quartiles of the time."""
    figure, ax = plt.subplots(figsize=(7.5, 5), layout="constrained")
    colours = dict.fromkeys(PLAIN.split(","), "C0") | dict.fromkeys(PAIRED.split(","), "C1")
    for row in found:
        mean, std = row.get("losses_minus_mha", (None, None))
        if "ratio" in row and std is not None:
            (low, ratio, high), name = row["ratio"], row["variant"]
            how = dict(fmt="o", ms=4, elinewidth=0.8, color=colours.get(name, "0.6"))  # grey: with a head norm
            ax.errorbar(ratio, mean, std / len(row["losses"]) ** 0.5, [[ratio - low], [high - ratio]], **how)
            ax.annotate(name, (ratio, mean), xytext=(4, 4), textcoords="offset points", fontsize=7, color=how["color"])
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel="time of a training step, MHA = 1", ylabel="validation loss minus MHA's, same seeds", xscale="log")
    ax.set_xticks([1, 1.5, 2, 3, 4], ["1", "1.5", "2", "3", "4"])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
    return figure


@dataclass
class Options:
    variants: str = option(f"{PLAIN},{NORMED},{PAIRED}", "with commas between them, as in sweep.py")
    stages: str = option(",".join(STAGES), "with commas between them, in this order")
    long_data: str = option("data/cpp-docs", "data set of the stage `long` (experiments/LOG.md says how to make it)")
    jobs: int = option(1, "runs at a time, of one thread each", least=1)
    out_dir: str = option("out/ranking", "where the run folders go")


def main(argv=None):
    o, _ = parse_options(Options, argv)
    rows = Rows(RESULTS / "ranking.json")
    try:
        if unknown := set(split_list(o.stages)) - {*STAGES}:
            raise ValueError(f"stages must be some of {', '.join(STAGES)}, not {', '.join(unknown)}")
        for variant in split_list(o.variants):
            sweep.variant_options(variant)
        for stage in split_list(o.stages):
            if stage == "time":
                missing = [name for name in split_list(o.variants) if f"time | {name}" not in rows]
                for name, row in (time_steps(missing) if missing else {}).items():
                    rows.fill(f"time | {name}", lambda: row)
            else:
                run_stage(o, rows, stage)
    except (ValueError, OSError) as error:
        fail(error)
    found = ranking(o, rows)
    rows.write_table("ranking.py", [*ranking_table(found), *rates_table(found, rows)])
    print(save_picture(rows.path.with_suffix(".png"), lambda plt: draw(plt, found)))


if __name__ == "__main__":
    run_program(main)
