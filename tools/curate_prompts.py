"""Choose the training prompts: those of the candidates at which the base painter is worst.

    python -m tools.curate_prompts --config config/dgx.py:carve3d_train [--config.KEY=VALUE ...]

--candidates  file with the candidate prompts (prompts/train_candidates.txt)
--samples     how often each candidate is painted (4)
--keep        how many prompts of lowest mean reward are kept (30)
--out         folder for the results (prompts/curated)

The base painter paints every candidate, each sample gets its reward, and the prompts with the lowest mean are kept, 30
of 100 as published. In --out there are afterwards
    results.jsonl   one line per scored prompt; an interrupted run resumes from here
    ranking.csv     all candidates, lowest mean reward first
    kept.txt        the kept ones, in the same order; config/dgx.py trains on this file
"""

import csv
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import tqdm
from absl import flags
from ml_collections import ConfigDict

from config import cli
from config.validate import validate
from diffusers_patch.loading import load_painter
from diffusers_patch.rollout import rollout
from mrc.rewards import load_reward
from prompts.dataset import load_prompts


def score_all(
    prompts: Sequence[str], score: Callable[[int, str], list[float]], results_file: str | Path, settings: dict
) -> dict[str, list[float]]:
    """Score every prompt that `results_file` does not have yet; returns {prompt: rewards} in the order of `prompts`.

    score: (index in `prompts`, prompt) -> that prompt's rewards. The result of each call is on disk before the next.
    settings: what the rewards depend on (JSON values). A file made with other ones is refused, not mixed.
    Raises ValueError for such a file, for a damaged one and for rewards that are not finite.
    """
    results_file = Path(results_file)
    done = _read_results(results_file, settings)
    results_file.parent.mkdir(parents=True, exist_ok=True)
    with results_file.open("a", encoding="utf-8") as file:
        if file.tell() == 0:
            _append(file, {"settings": settings})
        for index, prompt in enumerate(prompts):
            if prompt not in done:
                done[prompt] = [float(reward) for reward in score(index, prompt)]
                if not done[prompt] or not all(abs(reward) < float("inf") for reward in done[prompt]):
                    raise ValueError(
                        f"the rewards of {prompt!r} are {done[prompt]}, which cannot be ranked: check the "
                        f"painter and the reconstructor"
                    )
                _append(file, {"prompt": prompt, "rewards": done[prompt]})
    return {prompt: done[prompt] for prompt in prompts}


def write_ranking(results: dict[str, list[float]], out: str | Path, keep: int) -> list[str]:
    """Write ranking.csv and kept.txt into the folder `out`; returns the `keep` prompts of lowest mean reward.

    Prompts of equal mean stay in the order of `results`. Raises ValueError if there are fewer than `keep`.
    """
    if not 1 <= keep <= len(results):
        raise ValueError(f"--keep is {keep} but there are {len(results)} candidates: keep between 1 and {len(results)}")
    ranked = sorted(results, key=lambda prompt: statistics.fmean(results[prompt]))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "ranking.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["rank", "kept", "mean_reward", "std_reward", "samples", "prompt"])
        for rank, prompt in enumerate(ranked, start=1):
            rewards = results[prompt]
            table.writerow(
                [
                    rank,
                    int(rank <= keep),
                    f"{statistics.fmean(rewards):.6f}",
                    f"{statistics.pstdev(rewards):.6f}",
                    len(rewards),
                    prompt,
                ]
            )
    (out / "kept.txt").write_text("".join(f"{prompt}\n" for prompt in ranked[:keep]), encoding="utf-8")
    return ranked[:keep]


def _append(file, line: dict) -> None:
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()


def _read_results(path: Path, settings: dict) -> dict[str, list[float]]:
    """What an earlier run scored. A last line that was being written when it was killed is cut off the file."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        path.write_bytes(whole)
    try:
        lines = [json.loads(line) for line in whole.decode("utf-8").splitlines()]
        found = lines[0]["settings"] if lines else settings
        results = {line["prompt"]: line["rewards"] for line in lines[1:]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it to start again") from error
    if found != settings:
        differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
        raise ValueError(
            f"{path} was made with other settings ({', '.join(differing)}): remove it to start again, or "
            f"give another --out"
        )
    return results


def painter_score(config: ConfigDict, samples: int) -> Callable[[int, str], list[float]]:
    """A `score` for `score_all`: the rewards of `samples` pictures of a prompt by the base painter.

    The noise depends on the seed and the prompt's index alone, so an interrupted run ends with the same ranking.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reward_fn = load_reward(config, device)
    policy = load_painter(config, device)
    sample = config.sample

    @torch.no_grad()
    def score(index: int, prompt: str) -> list[float]:
        generator = torch.Generator(device).manual_seed(config.seed + index)
        painted = [prompt + sample.prompt_suffix] * samples
        trajectory = rollout(policy, painted, sample.num_steps, sample.guidance_scale, sample.eta, generator)
        return reward_fn(trajectory.views, [prompt] * samples).reward.tolist()

    return score


def define_flags() -> None:
    flags.DEFINE_string("candidates", "prompts/train_candidates.txt", "File with the candidate prompts.")
    flags.DEFINE_string("out", "prompts/curated", "Folder for the results.")
    flags.DEFINE_integer("samples", 4, "How often each candidate is painted.", lower_bound=1)
    flags.DEFINE_integer("keep", 30, "How many prompts of lowest mean reward are kept.", lower_bound=1)


def main(args) -> None:
    """args: the parsed flags."""
    config, out = args.config, Path(args.out)
    candidates = load_prompts(args.candidates)
    config.prompts.train_file = args.candidates  # the file that the config names is what this run is going to write
    config.prompts.num_train = 0
    validate(config, num_processes=1, device_type="cuda" if torch.cuda.is_available() else "cpu")
    if not 1 <= args.keep <= len(candidates):  # before hours of painting
        raise ValueError(
            f"--keep is {args.keep} but {args.candidates} has {len(candidates)} prompts: keep between 1 and "
            f"{len(candidates)}"
        )

    settings = {
        "pretrained": config.pretrained.to_dict(),
        "painter": config.painter.to_dict(),
        "seed": config.seed,
        "reward_fn": config.reward_fn,
        "recon": config.recon.to_dict(),
        "mrc": config.mrc.to_dict(),
        "num_steps": config.sample.num_steps,
        "guidance_scale": config.sample.guidance_scale,
        "eta": config.sample.eta,
        "initial_latents": config.sample.initial_latents,
        "blob_std": config.sample.blob_std,
        "prompt_suffix": config.sample.prompt_suffix,
        "candidates": candidates,
        "samples": args.samples,
    }
    score = painter_score(config, args.samples)
    with tqdm.tqdm(total=len(candidates), desc="curating") as bar:

        def score_with_progress(index: int, prompt: str) -> list[float]:
            bar.update(index - bar.n)
            return score(index, prompt)

        results = score_all(candidates, score_with_progress, out / "results.jsonl", settings)
        bar.update(len(candidates) - bar.n)
    kept = write_ranking(results, out, args.keep)
    print(f"kept {len(kept)} of {len(candidates)} prompts: {out / 'kept.txt'} (ranking: {out / 'ranking.csv'})")


if __name__ == "__main__":
    cli.run("curate_prompts", main, "config/dgx.py:carve3d_train", define_flags)
