"""Choose the training prompts: those of the candidates at which the base painter is worst.

    python -m tools.curate_prompts --config config/dgx.py:carve3d_train [--config.KEY=VALUE ...]

--candidates  file with the candidate prompts (prompts/train_candidates.txt)
--samples     how often each candidate is painted (4)
--keep        how many prompts of lowest mean reward are kept (30)
--out         folder for the results (prompts/curated)

The base painter paints every candidate, each sample gets its reward, and the prompts with the lowest mean are kept, 30
of 100 as published. In --out there are afterwards
    results_*.jsonl  one line per scored prompt; an interrupted run resumes from here
    ranking.csv      all candidates, lowest mean reward first; samples with an empty view are counted apart
    kept.txt         the kept ones, in the same order; config/dgx.py trains on this file

With several GPUs: torchrun --nproc_per_node 8 -m tools.curate_prompts --config ...
"""

import csv
import json
import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from absl import flags
from ml_collections import ConfigDict

from config import cli
from config.errors import UserError
from config.validate import check_folder, validate
from ddpo.evaluation import relevant_keys
from ddpo.progress import Progress
from ddpo.sampling import EVALUATION, collect_samples, make_generator
from ddpo.setup import set_arithmetic, start_accelerator
from diffusers_patch.checks import check_cameras
from diffusers_patch.loading import load_painter
from mrc.rewards import load_reward
from prompts.dataset import load_prompts


@dataclass
class Scores:
    """The rewards of a prompt's samples, and which of them have an empty view, whose reward is a penalty."""

    rewards: list[float]
    empty: list[bool]

    @property
    def mean(self) -> float:
        """Mean reward of the samples that show something; NaN if none does."""
        shown = [reward for reward, empty in zip(self.rewards, self.empty, strict=True) if not empty]
        return statistics.fmean(shown) if shown else math.nan


def score_all(
    prompts: Sequence[str],
    score: Callable[[int, str], Scores],
    folder: str | Path,
    settings: dict,
    process: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """Score every prompt that `folder` has no results of yet; returns {prompt: scores} in the order of `prompts`.

    score: (index in `prompts`, prompt) -> the scores of its samples, on disk before the next prompt is painted.
    settings: what the scores depend on (JSON values). Results of other ones are refused, not mixed.
    process: this one of `num_processes`, which share the prompts; wait: returns when all processes have called it.
    Raises ValueError for results of other settings, for damaged ones and for rewards that are not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = read_results(folder, settings)
    wait()  # until all have seen what is done
    missing = [index for index, prompt in enumerate(prompts) if prompt not in done]
    with (folder / f"results_{process:03d}.jsonl").open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            _append(file, {"settings": settings})
        for index in missing[process::num_processes]:
            scores = score(index, prompts[index])
            if not scores.rewards or not all(math.isfinite(reward) for reward in scores.rewards):
                raise UserError(
                    f"the rewards of {prompts[index]!r} are {scores.rewards}, which cannot be ranked: check the "
                    f"painter and the reconstructor"
                )
            _append(file, {"prompt": prompts[index], **asdict(scores)})
    wait()  # until all are done
    results = read_results(folder, settings)
    return {prompt: results[prompt] for prompt in prompts}


def write_ranking(results: dict[str, Scores], out: str | Path, keep: int) -> list[str]:
    """Write ranking.csv and kept.txt into the folder `out`; returns the `keep` prompts of lowest mean reward.

    Samples with an empty view do not count, and prompts that have no others come last. Prompts of equal mean stay in
    the order of `results`. Raises ValueError if there are fewer than `keep`.
    """
    if not 1 <= keep <= len(results):
        raise UserError(f"--keep is {keep} but there are {len(results)} candidates: keep between 1 and {len(results)}")
    ranked = sorted(results, key=lambda prompt: (math.isnan(results[prompt].mean), results[prompt].mean))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ranking.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["rank", "kept", "mean_reward", "std_reward", "samples", "empty", "prompt"])
        for rank, prompt in enumerate(ranked, start=1):
            scores = results[prompt]
            shown = [reward for reward, empty in zip(scores.rewards, scores.empty, strict=True) if not empty]
            spread = statistics.pstdev(shown) if shown else math.nan
            counts = [len(scores.rewards), sum(scores.empty)]
            table.writerow([rank, int(rank <= keep), f"{scores.mean:.6f}", f"{spread:.6f}", *counts, prompt])
    (out / "kept.txt").write_text("".join(f"{prompt}\n" for prompt in ranked[:keep]), encoding="utf-8")
    return ranked[:keep]


def _append(file, line: dict) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def read_results(folder: Path, settings: dict) -> dict[str, Scores]:
    """What earlier runs scored. A last line that was being written when its process was killed is cut off its file."""
    results = {}
    for path in sorted(folder.glob("results_*.jsonl")):
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            path.write_bytes(whole)
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
            found = lines[0]["settings"] if lines else settings
            results |= {line["prompt"]: Scores(line["rewards"], line["empty"]) for line in lines[1:]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): remove it to start again") from error
        if found != settings:
            differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
            raise UserError(
                f"{path} was made with other settings ({', '.join(differing)}): remove it to start again, or give "
                f"another --out"
            )
    return results


def painter_score(config: ConfigDict, samples: int, device: torch.device) -> Callable[[int, str], Scores]:
    """A `score` for `score_all`: the rewards of `samples` pictures of a prompt by the base painter.

    The noise depends on the seed, the prompt's index and the sample's alone, so an interrupted run ends with the same
    ranking.
    """
    reward_fn = load_reward(config, device)
    policy = load_painter(config, device)

    def score(index: int, prompt: str) -> Scores:
        generators = [make_generator(config.seed, EVALUATION, index, s) for s in range(samples)]
        painted = collect_samples(policy, reward_fn, [prompt] * samples, generators, config, score_reference=False)
        return Scores(painted.reward.tolist(), painted.empty.any(1).tolist())

    return score


def define_flags() -> None:
    flags.DEFINE_string("candidates", "prompts/train_candidates.txt", "File with the candidate prompts.")
    flags.DEFINE_string("out", "prompts/curated", "Folder for the results.")
    flags.DEFINE_integer("samples", 4, "How often each candidate is painted.", lower_bound=1)
    flags.DEFINE_integer("keep", 30, "How many prompts of lowest mean reward are kept.", lower_bound=1)


def main(args) -> None:
    """args: the parsed flags."""
    config, out = args.config, Path(args.out)
    check_folder("--out", out)
    candidates = load_prompts(args.candidates)
    repeated = [prompt for prompt, count in Counter(candidates).items() if count > 1]
    if repeated:
        raise UserError(f"{args.candidates} has {repeated[0]!r} more than once: leave every prompt in once")
    if not 1 <= args.keep <= len(candidates):
        raise UserError(
            f"--keep is {args.keep} but {args.candidates} has {len(candidates)} prompts: keep between 1 and "
            f"{len(candidates)}"
        )
    config.prompts.train_file = args.candidates  # the file that the config names is what this run is going to write
    config.prompts.num_train = 0
    config.tracker = "none"
    accelerator = start_accelerator(config)
    set_arithmetic(config)
    validate(config, 1, accelerator.device.type)  # as for one process: the prompts need not be shared evenly
    check_cameras(config)

    settings = {"--candidates": candidates, "--samples": args.samples, **relevant_keys(config, "seed", "reward_fn")}
    read_results(out, settings)  # refuses those of other settings before anything is loaded
    score = painter_score(config, args.samples, accelerator.device)
    with Progress("curating", len(candidates), "prompts", accelerator.is_local_main_process) as progress:

        def score_with_progress(index: int, prompt: str) -> Scores:
            progress.update(index - progress.done)
            return score(index, prompt)

        share = accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone
        results = score_all(candidates, score_with_progress, out, settings, *share)
        progress.update(len(candidates) - progress.done)
    if accelerator.is_main_process:
        kept = write_ranking(results, out, args.keep)
        print(f"kept {len(kept)} of {len(candidates)} prompts: {out / 'kept.txt'} (ranking: {out / 'ranking.csv'})")
    accelerator.end_training()


if __name__ == "__main__":
    cli.run("curate_prompts", main, "config/dgx.py:carve3d_train", define_flags)
