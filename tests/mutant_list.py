"""One-line edits that break the code, with the tests that must notice: what `tests.mutants` tries."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """In `file`, `old`, which is there exactly once, becomes `new`; then one of `tests` (below tests/) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]


def _in(file: str, *edits: tuple[str, str, str, str]) -> list[Mutant]:
    """Mutants of one file: (name, old, new, tests, separated by spaces)."""
    return [Mutant(name, file, old, new, tests.split()) for name, old, new, tests in edits]


_EXACT = "test_exact_gradient.py::test_gradients_are_those_of_what_is_painted"
_CHANCE = "test_chance.py::test_rewards_that_say_nothing_move_nothing"
_WORTH = "test_critic.py::test_gradients_are_those_of_what_the_next_state_is_worth"
_FORETELLS = "test_critic.py::test_a_critic_foretells_what_no_place_shows_alone"
_TRUST = "test_critic.py::test_trust_is_the_slope_of_new_samples"
_BAD = "test_critic.py::test_nothing_is_learned_from_bad_samples_and_nothing_forgotten"
_DIRECTION = "test_exact_gradient.py::test_the_direction_raises_the_reward_and_can_hold_the_area"
_FIRST = "test_run.py::test_the_first_epoch_learns_nothing_and_a_spent_kl_ends_the_run"
_RANDOM = "test_run.py::test_random_numbers_follow_from_seed_and_epoch"
_VALIDATION = "test_run.py::test_validations_have_the_same_noise_in_every_run_and_each_prompt_its_own"
_LIKELIER = "test_run.py::test_an_update_makes_good_samples_likelier_than_bad_ones"
_KL_KEYS = "test_run.py::test_the_kl_is_weighted_as_its_keys_say"
_EMPTY = "test_run.py::test_one_empty_view_is_enough_for_the_worst_advantage"
_ETA = "test_run.py::test_the_noise_of_every_step_is_as_strong_as_eta_says"
_RESTORED = "test_run.py::test_everything_that_training_changes_is_restored"
_MRC_KEYS = "test_run.py::test_keys_of_mrc_reach_the_reward"
_ASKED = "test_run.py::test_the_base_model_is_asked_where_its_kl_is_wanted"
_BETA = "test_run.py::test_the_kl_in_the_loss_is_weighted_by_beta"
_RESCALED = "test_run.py::test_guidance_is_rescaled_to_the_contrast_without_it"
_FUSED = "test_run.py::test_a_lora_is_fused_into_the_base_model"
_PAINTING = "test_update.py::test_gradients_taken_while_painting_are_those_of_the_update"
_WHERE_ASKED = "test_update.py::test_statistics_are_over_the_steps_at_which_the_base_model_was_asked"
_GOLDEN_UPDATE = "test_update.py::test_golden_update"
_DENSITY = "test_ddim_with_logprob.py::test_log_prob_is_the_mean_of_the_normal_density"
_UNBIASED = "test_steps.py::test_sums_over_drawn_steps_keep_their_expectation"
_STEPS = "test_steps.py::test_steps_of_a_run"
_KNOWN = "test_matching.py::test_the_step_is_that_of_a_model_which_knows_the_picture"
_MATCHED = "test_matching.py::test_the_loss_is_how_wrongly_the_picture_is_foretold"
_CLOSED = "test_update.py::test_a_kl_in_the_loss_in_closed_form_has_the_gradient_of_the_kl"
_HELD = "test_area.py::test_what_has_grown_is_penalised"
_LARGER = "test_area.py::test_advantages_that_pay_for_area_alone_pay_for_nothing"
_CHANGE = "test_report.py::test_a_change_is_a_paired_comparison"

MUTANTS = [
    *_in(
        "carve3d_train.py",
        (
            "advantages of the update with the wrong sign",
            "samples, advantages[local])",
            "samples, -advantages[local])",
            _LIKELIER,
        ),
        ("the same noise in every epoch", "NOISE, epoch, i)", "NOISE, 0, i)", _RANDOM),
        ("the same noise for every sample", "NOISE, epoch, i)", "NOISE, epoch, 0)", _RANDOM),
        ("the same shuffle in every epoch", "SHUFFLE_SAMPLES, epoch,", "SHUFFLE_SAMPLES, 0,", _RANDOM),
        (
            "noise of validations that follows the seed",
            "make_generator(0, VALIDATION, i)",
            "make_generator(self.config.seed, VALIDATION, i)",
            _VALIDATION,
        ),
        (
            "noise of validations that follows the epoch",
            "make_generator(0, VALIDATION, i)",
            "make_generator(self.epochs_done, VALIDATION, i)",
            _VALIDATION,
        ),
        (
            "the same noise for every validation prompt",
            "make_generator(0, VALIDATION, i)",
            "make_generator(0, VALIDATION)",
            _VALIDATION,
        ),
        ("kl_penalty ignored when scoring", "config.kl_penalty or config.log_kl", "config.log_kl", _ASKED),
        ("log_kl ignored", "config.kl_penalty or config.log_kl", "config.kl_penalty", _ASKED),
        (
            "stop_kl ignored",
            "0 < self.config.stop_kl <= self.kl",
            "False",
            _FIRST,
        ),
        (
            "an update in the first epoch",
            "if epoch > 0:  # the first",
            "if epoch >= 0:  # the first",
            _FIRST,
        ),
    ),
    *_in(
        "ddpo/advantages.py",
        (
            "advantages with the wrong sign",
            "torch.as_tensor(found,",
            "torch.as_tensor(-found,",
            _KL_KEYS,
        ),
        (
            "the KL added to the reward",
            "return advantages - kl_normalized_coeff",
            "return advantages + kl_normalized_coeff",
            _KL_KEYS,
        ),
        (
            "trackers swapped",
            'trackers["reward"],\n        trackers["kl"],',
            'trackers["kl"],\n        trackers["reward"],',
            _KL_KEYS,
        ),
        ("no reward tracker", '        trackers["reward"],', "        None,", _KL_KEYS),
        ("no KL tracker", '        trackers["kl"],', "        None,", _KL_KEYS),
        (
            "kl_in_reward ignored in advantages",
            'kept["kl"] if config.kl_penalty and config.kl_in_reward else None',
            'kept["kl"]',
            _KL_KEYS,
        ),
        (
            "kl_penalty ignored in advantages",
            "config.kl_penalty and config.kl_in_reward",
            "config.kl_in_reward",
            _KL_KEYS,
        ),
        ("kl_normalized_coeff ignored", "        config.kl_normalized_coeff,", "        0.2,", _KL_KEYS),
        (
            "mrc.empty_in_statistics ignored",
            " and not config.mrc.empty_in_statistics",
            "",
            _EMPTY,
        ),
        (
            "an empty view is punished by every reward",
            '"lpips" in kept and not',
            "not",
            _EMPTY,
        ),
        ("only samples without any object count as empty", 'kept["empty"].any(1)', 'kept["empty"].all(1)', _EMPTY),
        ("an empty sample gets the best advantage", "worst=-config", "worst=config", _EMPTY),
        (
            "shuffle_advantages ignored",
            "if config.shuffle_advantages:",
            "if False:",
            "test_run.py::test_a_control_gives_advantages_to_others_and_to_other_ones_in_every_epoch",
        ),
        (
            "the same shuffled advantages in every epoch",
            "SHUFFLE_ADVANTAGES, epoch)",
            "SHUFFLE_ADVANTAGES)",
            "test_run.py::test_a_control_gives_advantages_to_others_and_to_other_ones_in_every_epoch",
        ),
        (
            "rewards that are not divided by their std",
            " / (rewards.std() + STD_EPSILON)",
            "",
            "test_advantages.py::test_golden_variants",
        ),
    ),
    *_in(
        "ddpo/sampling.py",
        ("seed ignored by all streams", "SeedSequence([seed, purpose", "SeedSequence([0, purpose", _RANDOM),
        (
            "one stream for all purposes",
            "SeedSequence([seed, purpose, *indices])",
            "SeedSequence([seed, *indices])",
            "test_run.py::test_every_purpose_has_random_numbers_of_its_own",
        ),
        (
            "the same prompts in every epoch",
            "make_generator(config.seed, PROMPTS, epoch)",
            "make_generator(config.seed, PROMPTS, 0)",
            _RANDOM,
        ),
        (
            "sample.prompt_suffix ignored",
            "[prompt + suffix for prompt in prompts[batch]]",
            "prompts[batch]",
            "test_run.py::test_the_suffix_is_painted_but_not_judged",
        ),
        ("sample.eta ignored in painting", "            config.sample.eta,", "            1.0,", _ETA),
        (
            "kl_estimator ignored",
            "whole.kl(config.kl_estimator, ",
            'whole.kl("log_ratio", ',
            "test_run.py::test_the_kl_is_estimated_as_its_key_says",
        ),
        (
            "kl_timestep_fraction ignored",
            "reference_steps=draw_reference_steps(config, step_generator)",
            "reference_steps=draw_reference_steps(config)",
            "test_run.py::test_the_base_model_is_asked_as_often_as_wanted",
        ),
        (
            "every process paints the samples of the first",
            "slice(per_process * accelerator.process_index, ",
            "slice(0, ",
            "test_run.py::test_processes_share_an_epoch_without_overlap",
        ),
        (
            "scores of validations in the order in which they came",
            "for _, row in sorted(gather_object(rows), key=lambda item: item[0])",
            "for _, row in gather_object(rows)",
            "test_run.py::test_uneven_scores_are_put_in_order",
        ),
    ),
    *_in(
        "ddpo/ppo.py",
        (
            "the loss climbs down",
            "torch.maximum(-advantages * ratio, -advantages",
            "torch.maximum(advantages * ratio, advantages",
            "test_ppo.py::test_golden_losses",
        ),
        ("the clip is optimistic", "torch.maximum(", "torch.minimum(", "test_ppo.py::test_golden_losses"),
        (
            "nothing is clipped",
            "ratio.clamp(1 - clip_range, 1 + clip_range)",
            "ratio",
            "test_ppo.py::test_golden_losses",
        ),
        (
            "advantages are not clamped",
            "advantages.clamp(-adv_clip_max, adv_clip_max)",
            "advantages",
            "test_ppo.py::test_golden_losses",
        ),
        (
            "the inverse ratio",
            "log_ratio = log_prob - log_prob_old",
            "log_ratio = log_prob_old - log_prob",
            "test_ppo.py::test_golden_losses",
        ),
        (
            "the KL of the loss with the wrong sign",
            "losses + kl_beta * kl",
            "losses - kl_beta * kl",
            "test_ppo.py::test_golden_losses",
        ),
        (
            "the loss is unknown where the base model was not asked",
            "if kl_beta:  # 0",
            "if True:  # 0",
            _WHERE_ASKED,
        ),
        (
            "noise weights in proportion to sigma",
            "variance = std**2",
            "variance = std",
            "test_ppo.py::test_timestep_weights",
        ),
    ),
    *_in(
        "ddpo/update.py",
        (
            "steps that are as long by chance",
            'group["lr"], group["lr"] * length',
            'group["lr"], group["lr"]',
            "test_chance.py::test_steps_of_a_run_are_as_long_as_their_shares",
        ),
        (
            "steps that stay short",
            'group["lr"] = rate\n',
            'group["lr"] = rate * length\n',
            "test_chance.py::test_steps_of_a_run_are_as_long_as_their_shares",
        ),
        (
            "the KL of an update counts steps at which nobody was asked",
            'asked if name == "kl" else weights',
            "weights",
            _WHERE_ASKED,
        ),
        ("kl_beta ignored", "kl_beta = config.kl_beta if", "kl_beta = 0.001 if", _BETA),
        ("a KL in closed form without weights", "(weight * kl).mean()", "kl.mean()", _CLOSED),
        ("a KL in closed form that drives away", "loss + kl_beta * (weight", "loss - kl_beta * (weight", _CLOSED),
        ("a KL of the policy to itself", "mean_std(*given, reference=True)", "mean_std(*given)", _CLOSED),
        ("paths scored as if they had been matched", "        if matching:\n", "        if True:\n", _ETA),
        (
            "matching with guidance whatever config.train.cfg says",
            "config.sample.guidance_scale if train.cfg else 1.0",
            "config.sample.guidance_scale",
            _MATCHED,
        ),
        (
            "sample.eta ignored in the update",
            "scheduler, eta, K = config.train, policy.scheduler, config.sample.eta,",
            "scheduler, eta, K = config.train, policy.scheduler, 1.0,",
            _ETA,
        ),
        (
            "gradients taken while painting with the wrong sign",
            "set_gradient(parameters, -(advantages @ gradients)",
            "set_gradient(parameters, (advantages @ gradients)",
            f"{_PAINTING} {_LIKELIER}",
        ),
        (
            "gradients taken while painting are summed",
            "average_gradients(parameters, accelerator, len(advantages))",
            "average_gradients(parameters, accelerator, 1)",
            _PAINTING,
        ),
        (
            "advantages are not clamped while painting",
            "advantages.clamp(-config.train.adv_clip_max, config.train.adv_clip_max)",
            "advantages.clone()",
            _PAINTING,
        ),
        ("gradients are not clipped", "parameters, config.train.max_grad_norm)", "parameters, 1e9)", _GOLDEN_UPDATE),
        (
            "gradients are summed over micro-batches",
            "    torch._foreach_div_(grads, count)",
            "    pass",
            _GOLDEN_UPDATE,
        ),
        (
            "steps are weighted by their place in the draw",
            ".gather(1, steps)",
            "[:, :K]",
            "test_update.py::test_noise_weights_do_not_depend_on_the_steps_drawn",
        ),
        (
            "samples are not shuffled",
            "order = torch.randperm(num_samples, generator=generator)",
            "order = torch.arange(num_samples)",
            "test_update.py::test_micro_batches_hold_every_sample_once_per_pass_and_no_skipped_step",
        ),
        (
            "steps that overflowed are made",
            "if finite or getattr",
            "if True or getattr",
            "test_update.py::test_a_gradient_that_is_not_finite_never_reaches_the_weights",
        ),
    ),
    *_in(
        "ddpo/steps.py",
        (
            "drawn steps keep their weights",
            "torch.where(drawn, weights / p, 0.0)",
            "torch.where(drawn, weights, 0.0)",
            _UNBIASED,
        ),
        (
            "the same steps are drawn every time",
            "torch.rand((), generator=generator, dtype=torch.float64)",
            "0.5",
            f"{_UNBIASED} test_steps.py::test_equal_steps_are_drawn_at_equal_distances",
        ),
        ("probabilities above 1", "while (p > 1).any():", "while False:", _UNBIASED),
        ("weights that add up to the number of steps", "drawn / trainable", "drawn", f"{_STEPS} {_PAINTING}"),
        (
            "the base model is asked at skipped steps",
            "asked[:trainable] = draw_steps(torch.ones(trainable), count, generator) > 0",
            "asked[:] = True",
            _STEPS,
        ),
    ),
    *_in(
        "ddpo/stat_tracking.py",
        (
            "the std of a sample",
            "seen.std() + STD_EPSILON",
            "seen.std(ddof=1) + STD_EPSILON",
            "test_stat_tracking.py::test_golden_sequences",
        ),
        (
            "statistics of one value too few",
            "len(history) < self.min_count",
            "len(history) <= self.min_count",
            "test_stat_tracking.py::test_golden_sequences",
        ),
        (
            "statistics without this epoch's values",
            "history.extend(values[i].tolist())",
            "history.extend(values[i[:1]].tolist())",
            "test_stat_tracking.py::test_golden_sequences",
        ),
        (
            "a restored tracker keeps the oldest",
            "deque(values, maxlen=self.buffer_size)",
            "deque(values[: self.buffer_size])",
            "test_stat_tracking.py::test_a_smaller_buffer_keeps_the_newest_values",
        ),
        (
            "kl_per_prompt_stat_tracking ignored",
            "of_kl = config.kl_in_reward and config.kl_per_prompt_stat_tracking",
            "of_kl = config.kl_in_reward",
            _KL_KEYS,
        ),
        (
            "statistics of a KL that nobody reads",
            "of_kl = config.kl_in_reward and config.kl_per_prompt_stat_tracking",
            "of_kl = config.kl_per_prompt_stat_tracking",
            _KL_KEYS,
        ),
    ),
    *_in(
        "ddpo/calibration.py",
        (
            "a calibration of the step that was shortened",
            "total / count / length**2",
            "total / count",
            "test_chance.py::test_steps_of_a_run_are_as_long_as_their_shares",
        ),
        (
            "sample.eta ignored in the calibration",
            "mean_std(*given, config.sample.guidance_scale, config.sample.eta)",
            "mean_std(*given, config.sample.guidance_scale, 1.0)",
            _ETA,
        ),
        (
            "the learning rate follows the KL, not its root",
            "max(kl, 1e-12)) ** 0.5",
            "max(kl, 1e-12)) ** 1.0",
            "test_update.py::test_calibration_reaches_the_wanted_kl",
        ),
        (
            "half the KL",
            "(2 * std**2)).flatten(1).sum(1)",
            "(4 * std**2)).flatten(1).sum(1)",
            "test_update.py::test_kl_between_is_the_sum_over_steps_and_dimensions",
        ),
        (
            "skipped steps enter the calibration",
            "for k in range(trainable_steps(config)):",
            "for k in range(trajectory.num_steps):",
            "test_update.py::test_trajectory_means_leaves_out_skipped_steps_and_is_exact_in_half_precision",
        ),
    ),
    *_in(
        "ddpo/checkpoint.py",
        (
            "the loss scaler is not restored",
            'run.accelerator.scaler.load_state_dict(state["loss_scaler"])',
            "pass",
            _RESTORED,
        ),
        ("areas are not restored", 'run.area_control.load_state_dict(state["area"])', "pass", _RESTORED),
        ("trackers are not restored", 'tracker.load_state_dict(state["trackers"][name])', "pass", _RESTORED),
        (
            "the reward tracker is restored as that of the KL",
            'tracker.load_state_dict(state["trackers"][name])',
            'tracker.load_state_dict(state["trackers"]["kl"])',
            _RESTORED,
        ),
        (
            "the calibration is not restored",
            'run.calibration.load_state_dict(state["calibration"], rate)',
            "pass",
            _RESTORED,
        ),
        (
            "the optimizer is not restored",
            "run.optimizer.load_state_dict(optimizer_state)",
            "pass",
            _RESTORED,
        ),
        (
            "damage is overlooked",
            "if _fingerprint(file) != expected:",
            "if False:",
            "test_checkpoint.py::test_a_damaged_checkpoint_is_refused_and_the_one_before_used_if_asked",
        ),
        (
            "the newest checkpoints are removed",
            "checkpoints(run_folder)[:-limit]",
            "checkpoints(run_folder)[limit:]",
            "test_checkpoint.py::test_old_checkpoints_go_and_order_is_by_number",
        ),
        (
            "checkpoints are sorted by name",
            "sorted(found, key=epochs_of)",
            "sorted(found)",
            "test_checkpoint.py::test_old_checkpoints_go_and_order_is_by_number",
        ),
    ),
    *_in(
        "ddpo/files.py",
        (
            "half-written files keep their names",
            "partial = path.with_name(PARTIAL + path.name)",
            "partial = path",
            "test_interruptions.py::test_what_is_half_written_goes_and_what_was_there_stays",
        ),
        (
            "half a line stays",
            "            handle.truncate(size)",
            "            pass",
            "test_interruptions.py::test_a_line_is_appended_whole_or_not_at_all",
        ),
    ),
    *_in(
        "ddpo/final.py",
        (
            "final/README.md paints without noise",
            'f"eta={sample.eta}"',
            '"eta=0.0"',
            "test_interruptions.py::test_stock_diffusers_paints_the_validation_with_the_code_in_final",
        ),
    ),
    *_in(
        "ddpo/run_folder.py",
        (
            "a folder that is in use is taken",
            "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
            "pass",
            "test_interruptions.py::test_a_folder_is_in_use_until_its_process_ends_however",
        ),
        (
            "a run goes on under another name",
            "if resumes and config.run_name and claimed",
            "if False and claimed",
            "test_interruptions.py::test_a_run_does_not_resume_under_another_name",
        ),
        (
            "a run goes on with rewards that measure something else",
            "in relevant and not key",
            "in () and not key",
            "test_interruptions.py::test_what_cannot_be_resumed_is_refused_and_nothing_is_written",
        ),
    ),
    *_in(
        "ddpo/evaluation.py",
        (
            "an unpaired test",
            "ttest_rel(a, b).pvalue",
            'getattr(__import__("scipy.stats").stats, "ttest_ind")(a, b).pvalue',
            f"{_CHANGE} test_evaluate.py::test_standard_errors_are_over_prompts",
        ),
        (
            "standard errors over samples",
            "values = values.mean(1)  #",
            "values = values.flatten()  #",
            "test_evaluate.py::test_standard_errors_are_over_prompts",
        ),
        (
            "one judge that disagrees is enough",
            "if len(against) >= 2:",
            "if len(against) >= 1:",
            "test_judges.py::test_a_reward_that_rises_alone_is_named",
        ),
        (
            "a price that may be chance",
            "< PAID]",
            "> PAID]",
            "test_judges.py::test_what_a_better_reward_was_paid_with_is_named",
        ),
    ),
    *_in(
        "ddpo/report/summary.py",
        (
            "a report's changes with the wrong sign",
            "return self.after - self.before",
            "return self.before - self.after",
            _CHANGE,
        ),
        (
            "captions without a number count",
            "both = np.isfinite(a) & np.isfinite(b)",
            "both = np.isfinite(a) | np.isfinite(b)",
            _CHANGE,
        ),
    ),
    *_in(
        "diffusers_patch/ddim_with_logprob.py",
        (
            "log-probabilities with the wrong sign",
            "log_density = -((prev_sample - mean) ** 2)",
            "log_density = ((prev_sample - mean) ** 2)",
            _DENSITY,
        ),
        ("log-probabilities without the log of the std", " - std.log() - 0.5", " - 0.5", _DENSITY),
        (
            "log-probabilities are sums",
            "log_density.flatten(1).mean(dim=1)",
            "log_density.flatten(1).sum(dim=1)",
            _DENSITY,
        ),
        (
            "gradients flow into the action",
            "prev_sample.detach().to(mean.dtype)",
            "prev_sample.to(mean.dtype)",
            "test_ddim_with_logprob.py::test_an_action_has_no_gradient",
        ),
        (
            "eta scales the variance",
            "var = eta**2 * _posterior_variance(a_t, a_prev)",
            "var = eta * _posterior_variance(a_t, a_prev)",
            "test_ddim_with_logprob.py::test_golden_draw",
        ),
        (
            "the direction towards x_t keeps its length",
            "(1 - a_prev - var).clamp(min=0).sqrt()",
            "(1 - a_prev).sqrt()",
            "test_ddim_with_logprob.py::test_golden_draw",
        ),
        (
            "another variance",
            "return (1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)",
            "return (1 - a_prev) / (1 - a_t) * (1 - a_t * a_prev)",
            "test_ddim_with_logprob.py::test_golden_draw",
        ),
        (
            "half the analytic KL",
            "(2 * std**2)).flatten(1).mean(dim=1)",
            "(4 * std**2)).flatten(1).mean(dim=1)",
            "test_ddim_with_logprob.py::test_analytic_kl_is_the_expected_log_ratio",
        ),
        (
            "velocity for noise",
            "signal * output + noise * x_t",
            "signal * output - noise * x_t",
            "test_ddim_with_logprob.py::test_golden_draw",
        ),
    ),
    *_in(
        "diffusers_patch/rollout.py",
        (
            "draws are scored before they are rounded",
            "log_prob = gaussian_log_prob(x_prev, mean, std)\n",
            "log_prob = gaussian_log_prob(mean + std * noise, mean, std)\n",
            "test_rollout.py::test_what_is_scored_is_what_is_kept",
        ),
        (
            "the same noise at every step",
            "for _ in range(num_steps)]\n    return torch.stack(noises)",
            "for _ in range(1)] * num_steps\n    return torch.stack(noises)",
            "test_rollout.py::test_noise_is_that_of_one_draw_after_another",
        ),
        (
            "the KL of the base model to the policy",
            "self.log_probs - self.log_probs_reference",
            "self.log_probs_reference - self.log_probs",
            "test_rollout.py::test_a_trajectory_in_parts test_run.py::test_the_kl_is_estimated_as_its_key_says",
        ),
        (
            "skipped steps enter the KL",
            "per_step[:, : self.num_steps - skip_last]",
            "per_step",
            "test_rollout.py::test_golden_run",
        ),
        (
            "the policy is its own reference",
            "policy.mean_std(*given, reference=True)",
            "policy.mean_std(*given)",
            "test_rollout.py::test_golden_run",
        ),
        (
            "the step before is scored",
            "next_latents=self.latents[row, column + 1]",
            "next_latents=self.latents[row, column]",
            "test_rollout.py::test_a_trajectory_in_parts",
        ),
        (
            "weights of steps are ignored while painting",
            "backward(weight * log_prob.sum())",
            "backward(log_prob.sum())",
            _PAINTING,
        ),
    ),
    *_in(
        "diffusers_patch/sample_gradients.py",
        (
            "gradients of samples are mixed",
            "inputs = inputs.reshape(batch, -1, inputs.shape[-1])",
            "inputs = inputs.reshape(batch, -1, inputs.shape[-1]).flip(0)",
            "test_sample_gradients.py::test_gradients_are_those_of_each_sample_alone",
        ),
        (
            "only the last backward pass counts",
            "ctx.total += weight_gradients",
            "ctx.total[:] = weight_gradients",
            "test_sample_gradients.py::test_gradients_are_those_of_each_sample_alone",
        ),
        (
            "kernels are not turned",
            ".flip(2).flatten(1, 2)",
            ".flatten(1, 2)",
            "test_sample_gradients.py::test_gradients_are_those_of_each_sample_alone",
        ),
    ),
    *_in(
        "diffusers_patch/policy.py",
        (
            "guidance away from the caption",
            "unconditional + guidance_scale * (conditional - unconditional)",
            "conditional + guidance_scale * (unconditional - conditional)",
            "test_rollout.py::test_golden_run",
        ),
        ("guidance_rescale of the policy ignored", "if self.guidance_rescale > 0:", "if False:", _RESCALED),
        (
            "the reference has the LoRA",
            "layer._disable_adapters = True",
            "layer._disable_adapters = False",
            "test_rollout.py::test_the_reference_is_the_model_without_its_lora",
        ),
        (
            "the LoRA stays switched off",
            "            for layer in self._lora_layers if reference else ():\n                layer._disable",
            "            for layer in ():\n                layer._disable",
            "test_rollout.py::test_the_reference_is_the_model_without_its_lora",
        ),
    ),
    *_in(
        "diffusers_patch/loading.py",
        (
            "guidance_rescale of the grid painter ignored",
            "MVSDXL(pipeline, cameras, config.sample.guidance_rescale,",
            "MVSDXL(pipeline, cameras, 0.0,",
            _RESCALED,
        ),
        ("guidance_rescale of MVDream ignored", "vectors, config.sample.guidance_rescale,", "vectors, 0.0,", _RESCALED),
        ("pretrained.lora ignored", "fuse_lora(pipeline, config.pretrained.lora)", "pass", _FUSED),
        ("no fusion of pretrained.lora", "    pipeline.fuse_lora()", "    pass", _FUSED),
        ("seed ignored by the LoRA", "torch.manual_seed(config.seed)", "torch.manual_seed(0)", _RANDOM),
    ),
    *_in(
        "diffusers_patch/mv_sdxl.py",
        (
            "views column by column",
            ".permute(0, 2, 4, 1, 3, 5)",
            ".permute(0, 4, 2, 1, 3, 5)",
            "test_tiny_world.py::test_background_is_white_and_views_survive_tiling_into_a_grid_and_splitting",
        ),
        (
            "latents in the VAE's scale",
            "(latents / vae.config.scaling_factor)",
            "(latents * vae.config.scaling_factor)",
            "test_rollout.py::test_golden_embeddings_and_images",
        ),
    ),
    *_in(
        "mrc/mrc.py",
        (
            "the reward is MRC",
            "reward = -distances.nanmean(dim=1)",
            "reward = distances.nanmean(dim=1)",
            "test_mrc.py::test_golden_rewards",
        ),
        (
            "empty samples are those without any object",
            "empty.any(dim=1), empty_view_reward",
            "empty.all(dim=1), empty_view_reward",
            "test_mrc.py::test_an_empty_view_cannot_win",
        ),
        (
            "the box is the render's",
            "crop_pairs(*pairs, view_boxes(pairs[0]))",
            "crop_pairs(*pairs, view_boxes(pairs[1]))",
            "test_mrc.py::test_golden_rewards",
        ),
        (
            "crops without antialiasing",
            'mode="bicubic", antialias=True',
            'mode="bicubic", antialias=False',
            "test_mrc.py::test_golden_crops test_mrc.py::test_golden_rewards",
        ),
    ),
    *_in(
        "mrc/bounding_box.py",
        (
            "a threshold that is never reached",
            "| (foreground < min_foreground)",
            "| (foreground < 0)",
            "test_mrc.py::test_a_dot_is_as_good_as_nothing",
        ),
        (
            "a view without foreground that is not empty",
            "(foreground == 0) | ",
            "",
            "test_mrc.py::test_a_white_view_is_empty_whatever_the_reward",
        ),
        (
            "dark in every channel",
            "(images < BACKGROUND).any(dim=-3)",
            "(images < BACKGROUND).all(dim=-3)",
            "test_mrc.py::test_golden_boxes",
        ),
        (
            "boxes that exclude their last pixel",
            "last = torch.where(occupied, index, 0).amax(dim=-1)",
            "last = torch.where(occupied, index, 0).amax(dim=-1) - 1",
            "test_mrc.py::test_golden_boxes",
        ),
        (
            "another padding",
            "PADDING = 5",
            "PADDING = 4",
            "test_mrc.py::test_golden_rewards test_mrc.py::test_golden_boxes",
        ),
        (
            "the longer side grows",
            "grow_x = ((-excess)",
            "grow_x = (excess",
            "test_mrc.py::test_square_boxes_of_plain_numbers_and_odd_differences",
        ),
    ),
    *_in(
        "mrc/rewards.py",
        ("mrc.bbox_lpips ignored", "bbox_lpips=config.mrc.bbox_lpips", "bbox_lpips=True", _MRC_KEYS),
        ("mrc.min_foreground ignored", "min_foreground=config.mrc.min_foreground", "min_foreground=0.005", _MRC_KEYS),
        (
            "mrc.empty_view_reward ignored",
            "empty_view_reward=config.mrc.empty_view_reward",
            "empty_view_reward=-1.0",
            _MRC_KEYS,
        ),
    ),
    *_in(
        "mrc/sanity_rewards.py",
        (
            "a JPEG of another quality",
            "quality=JPEG_QUALITY",
            "quality=50",
            "test_mrc.py::test_jpeg_rewards_are_sizes_of_files",
        ),
        (
            "compressibility with the wrong sign",
            "return -jpeg_incompressibility(views)",
            "return jpeg_incompressibility(views)",
            "test_mrc.py::test_jpeg_rewards",
        ),
    ),
    *_in(
        "mrc/lpips.py",
        (
            "distances that are not squared",
            "(unit_a - unit_b) ** 2",
            "(unit_a - unit_b).abs()",
            "test_lpips.py::test_golden_distances",
        ),
        ("pictures in [0, 1]", "(2 * x - 1 - self.shift)", "(x - self.shift)", "test_lpips.py::test_golden_distances"),
    ),
    *_in(
        "mrc/judges.py",
        (
            "a hull of any silhouette",
            "seen.all(0).float()",
            "seen.any(0).float()",
            "test_judges.py::test_the_hull_of_a_sphere_is_a_little_larger_than_the_sphere",
        ),
        (
            "agreement for disagreement",
            "return 1 - agreement.mean(1)",
            "return agreement.mean(1)",
            "test_judges.py::test_silhouettes_of_one_object_have_a_hull_and_others_have_not",
        ),
        (
            "the held-out view is among the others",
            "if v != left_out]",
            "]",
            "test_mrc.py::test_the_view_that_is_foretold_is_not_seen",
        ),
    ),
    *_in(
        "mrc/met3r_distance.py",
        (
            "nothing in common is perfect",
            "torch.where(overlap.flatten(1).any(1), distances, 1.0)",
            "distances",
            "test_judges.py::test_met3r_is_asked_about_neighbours_and_never_calls_nothing_in_common_perfect",
        ),
        (
            "views beside themselves",
            "views.roll(-1, 1)",
            "views",
            "test_judges.py::test_met3r_is_asked_about_neighbours_and_never_calls_nothing_in_common_perfect",
        ),
    ),
    *_in(
        "recon/cameras.py",
        (
            "cameras upside down",
            "down = torch.linalg.cross(forward, right, dim=-1)",
            "down = torch.linalg.cross(right, forward, dim=-1)",
            "test_recon.py::test_the_origin_is_in_the_middle_and_up_is_up",
        ),
        (
            "cameras from below",
            "elevation.cos() * azimuth.sin(), elevation.sin()]",
            "elevation.cos() * azimuth.sin(), -elevation.sin()]",
            "test_recon.py::test_angles_are_read_back test_recon.py::test_the_origin_is_in_the_middle_and_up_is_up",
        ),
        (
            "clockwise cameras",
            "elevation.cos() * azimuth.sin(),",
            "-elevation.cos() * azimuth.sin(),",
            "test_recon.py::test_angles_are_read_back",
        ),
        (
            "half the field of view",
            "0.5 / math.tan(math.radians(fov) / 2)",
            "0.5 / math.tan(math.radians(fov) / 4)",
            "test_recon.py::test_angles_are_read_back test_recon.py::test_cameras_that_do_not_fit_are_described",
        ),
        (
            "rays through corners of pixels",
            "dtype=cameras.c2w.dtype) + 0.5) / size",
            "dtype=cameras.c2w.dtype)) / size",
            "test_recon.py::test_rays_and_projection_are_inverse",
        ),
        (
            "another azimuth is no difference",
            "if rotation.abs().max() > tolerance:",
            "if False:",
            "test_recon.py::test_cameras_that_do_not_fit_are_described",
        ),
    ),
    *_in(
        "recon/volume_rendering.py",
        (
            "light that is not absorbed",
            "(1, 0)).cumsum(-1)",
            "(1, 0))",
            "test_recon.py::test_constant_density_has_a_closed_form",
        ),
        (
            "a black background",
            "(1 - alpha[..., None]) * background, alpha",
            "0 * background, alpha",
            "test_recon.py::test_constant_density_has_a_closed_form",
        ),
        (
            "planes are read transposed",
            "points[..., 1:].flip(-1)",
            "points[..., 1:]",
            "test_recon.py::test_planes_are_sampled_in_the_documented_order",
        ),
        (
            "fine samples where nothing is",
            "return t0 + (t1 - t0) *",
            "return t0 + 0 *",
            "test_recon.py::test_importance_samples_sharpen_the_surface test_recon.py::test_box_and_depths",
        ),
    ),
    *_in(
        "recon/gaussian_splatting.py",
        ("no blur", "BLUR = 0.3", "BLUR = 0.0", "test_gaussian_splatting.py::test_one_gaussian_in_closed_form"),
        (
            "farthest first",
            "depth[seen].float().argsort(stable=True)",
            "(-depth[seen].float()).argsort(stable=True)",
            "test_gaussian_splatting.py::test_golden_scenes",
        ),
        (
            "scales squared",
            "_rotations(quaternions) * scales[:, None]",
            "_rotations(quaternions) * scales[:, None] ** 2",
            "test_gaussian_splatting.py::test_golden_scenes",
        ),
        (
            "rotations transposed",
            "2 * (x * y - w * z),",
            "2 * (x * y + w * z) ,",
            "test_gaussian_splatting.py::test_golden_scenes",
        ),
    ),
    *_in(
        "config/batches.py",
        (
            "kl_penalty ignored in the loss",
            "return config.kl_penalty and not config.kl_in_reward",
            "return not config.kl_in_reward",
            _BETA,
        ),
        (
            "kl_in_reward ignored in the loss",
            "return config.kl_penalty and not config.kl_in_reward",
            "return config.kl_penalty",
            _BETA,
        ),
        (
            "gradients while painting for several updates",
            "painted and updates_per_epoch(config) == 1 and",
            "painted and",
            "test_run.py::test_gradients_are_taken_while_painting_only_where_an_epoch_has_one_update",
        ),
    ),
    *_in(
        "ddpo/matching.py",
        ("the initial latents for the picture", "latents[:, -1]", "latents[:, 0]", _KNOWN),
        (
            "the step of a model that knew the noise alone",
            "matching_output(scheduler, picture,",
            "(lambda *a: a[2])(scheduler, picture,",
            _KNOWN,
        ),
    ),
    *_in(
        "diffusers_patch/ddim_with_logprob.py",
        (
            "velocity of the wrong sign",
            "return a_t.sqrt() * noise - (1 - a_t).sqrt() * clean",
            "return (1 - a_t).sqrt() * clean - a_t.sqrt() * noise",
            _KNOWN,
        ),
    ),
    *_in(
        "ddpo/area.py",
        ("growth is rewarded", "- self.penalty() * larger", "+ self.penalty() * larger", _HELD),
        ("growth is not penalised", " - self.penalty() * larger", "", _HELD),
        ("area is paid for", "return without(advantages, larger)", "return advantages", _LARGER),
        ("growth since the last epoch", "self.start.setdefault(prompt, ", "self.start.__setitem__(prompt, ", _HELD),
        ("growth that is not smoothed", "[-SMOOTHED:]", "[-1:]", _HELD),
        ("growth that is forgotten", "INTEGRAL * np.sum(self.growth)", "0.0", _HELD),
        ("penalties without a limit", "np.clip(wanted, -LARGEST_PENALTY, LARGEST_PENALTY)", "wanted", _HELD),
        (
            "bad samples have an advantage",
            "larger[torch.from_numpy(good)] =",
            "larger[: len(kept)] =",
            "test_area.py::test_bad_samples_are_not_counted",
        ),
        (
            "mean area for the median",
            "np.median(foreground, 1)",
            "foreground.mean(1)",
            "test_area.py::test_an_object_is_as_large_as_most_of_its_views_show_it",
        ),
    ),
    *_in(
        "mrc/judges.py",
        (
            "diversity over all prompts",
            "if prompts[a] == prompts[b]:",
            "if True:",
            "test_judges.py::test_diversity_falls_when_a_painter_collapses",
        ),
    ),
    *_in(
        "tools/measure_signal.py",
        (
            "gradients in half precision without a scale",
            "(SCALE * loss).backward()",
            "loss.backward()",
            "test_measure_signal.py::test_gradients_do_not_underflow_in_half_precision",
        ),
        (
            "a step foretold on the samples that made it",
            "((half, ~half), (~half, half))",
            "((half, half), (~half, ~half))",
            "test_measure_signal.py::test_a_planted_signal_is_seen_and_no_other",
        ),
    ),
    *_in(
        "ddpo/chance.py",
        ("chance that is its mean alone", "DEVIATIONS * deviation", "0 * deviation", _CHANCE),
        (
            "chance that is never shuffled",
            "torch.randperm(len(advantages), generator=generator)",
            "torch.arange(len(advantages))",
            _CHANCE,
        ),
        ("chance that explains nothing", "return max(0.0, share)", "return 1.0", _CHANCE),
        ("steps against the gain", "max(0.0, share)", "max(-1.0, share)", _CHANCE),
        (
            "deviations from nothing instead of from chance",
            "(gain - mean) / deviation",
            "gain / deviation",
            _CHANCE,
        ),
        (
            "a past that nobody asks",
            " + products[:, -1]",
            " + 0 * products[:, -1]",
            "test_chance.py::test_a_direction_that_is_confirmed_tells_more",
        ),
        (
            "momentum of the wrong sign",
            "return -scale",
            "return scale",
            "test_chance.py::test_momentum_is_what_adams_step_has_beside_the_samples",
        ),
        (
            "samples that are compared within a process alone",
            "accelerator.gather(part.float().to(accelerator.device))",
            "part.float().repeat(accelerator.num_processes, 1)",
            "test_chance.py::test_all_processes_find_what_all_samples_say",
        ),
        (
            "gradients as they are, without Adam's scaling",
            "return vectors / (squares + FLOOR * mean).sqrt()",
            "return vectors",
            "test_chance.py::test_products_are_of_gradients_as_adam_scales_them",
        ),
    ),
    *_in(
        "tiny/critic.py",
        (
            "value gradients of the wrong sign",
            "mean.backward((kl_weight * moved / std - upwards) / batch)",
            "mean.backward((upwards - kl_weight * moved / std) / batch)",
            _WORTH,
        ),
        (
            "a pull away from the base model",
            "kl_weight * moved / std -",
            "-kl_weight * moved / std -",
            _WORTH,
        ),
        ("a KL of another unit", "kl_weight * moved / std -", "kl_weight * moved -", _WORTH),
        (
            "some objects shrink and others grow",
            "torch.vmap(without)(upwards.flatten(1), larger.flatten(1)).view_as(x)",
            "without(upwards.flatten(), larger.flatten()).view_as(x)",
            "test_critic.py::test_a_reward_for_area_alone_is_none_where_area_is_held",
        ),
        (
            "growth that is paid for",
            "upwards - torch.einsum(",
            "upwards + torch.einsum(",
            "test_critic.py::test_objects_are_pulled_to_their_usual_area",
        ),
        (
            "one area for all objects of a batch",
            "AREA_WEIGHT * area, larger)",
            "AREA_WEIGHT * area.mean().expand(batch), larger)",
            "test_critic.py::test_objects_are_pulled_to_their_usual_area",
        ),
        ("a critic that is trusted blindly", "kl = trust[k] * better", "kl = better", _WORTH),
        ("value gradients that forget the noise", "mean.detach() + std * noise", "mean.detach()", _WORTH),
        (
            "steps that all begin at the first state",
            "        x = x.detach()\n",
            "        x = step[0]\n",
            _WORTH,
        ),
        (
            "the next state judged at the time before",
            "torch.zeros_like(timesteps[..., 0]) if k + 1 == timesteps.shape[-1] else timesteps[..., k + 1]",
            "timesteps[..., k]",
            _WORTH,
        ),
        (
            "turned objects whose views are in disorder",
            "views.roll(turn, 0)",
            "views.roll(turn, -1).flip(0)",
            "test_critic.py::test_turned_objects_keep_their_views_in_order",
        ),
        (
            "a learning rate that stays",
            "rate * config.train.learning_rate",
            "config.train.learning_rate",
            "test_critic.py::test_the_command",
        ),
        ("a critic that compares no places", "alike.flatten(1)", "0 * alike.flatten(1)", _FORETELLS),
        (
            "a critic that learns another sample's reward",
            "said - truth[n].to(device)",
            "said - truth[:BATCH].to(device)",
            _FORETELLS,
        ),
        ("trust in a critic that is wrong", ".clamp(0, 1)", ".clamp(max=1)", _TRUST),
        ("trust by chance", "slope - 2 * (left", "slope - 0 * (left", "test_critic.py::test_chance_is_not_trusted"),
        ("more trust than a critic asks for", ".clamp(0, 1)", ".clamp(min=0)", _TRUST),
        ("trust for the trend of the epochs", "said - said.mean(0), reward - reward.mean()", "said, reward", _TRUST),
        (
            "a critic that learns from bad samples",
            "samples.reward.cpu().isfinite()",
            "torch.ones(len(prompts))",
            _BAD,
        ),
        (
            "a critic that forgets",
            "        self.epochs.append(",
            "        self.epochs[:] = []\n        self.epochs.append(",
            _BAD,
        ),
        (
            "a critic that falls behind its painter",
            "        if later:",
            "        if False:",
            "test_critic.py::test_a_critic_keeps_up_with_its_painter",
        ),
        (
            "rewards measured against those of the same epoch",
            "        if epoch == 0:\n            rows",
            "        if epoch >= 0:\n            rows",
            "test_critic.py::test_the_same_picture_is_worth_the_same_later_on",
        ),
        (
            "a control that gives away how good an epoch was",
            "values[order, 0] - values[:, 0].mean()",
            "values[order, 0]",
            "test_critic.py::test_shuffled_rewards_say_nothing_of_their_samples",
        ),
    ),
    *_in(
        "tiny/ascent.py",
        (
            "a control of reversed rewards that are not",
            "reward=-samples.reward",
            "reward=samples.reward",
            "test_best_of_n.py::test_reversed_rewards_choose_the_worst",
        ),
        (
            "weights that are not kept",
            'self.policy.save_lora(self.log.folder / "lora"',
            'str(self.log.folder / "lora"',
            "test_exact_gradient.py::test_the_command",
        ),
    ),
    *_in(
        "tiny/best_of_n.py",
        (
            "the worst of n",
            "best = {}",
            "best, values = {}, -values",
            "test_best_of_n.py::test_the_best_of_each_prompt_is_kept",
        ),
        (
            "samples that are chosen for their size",
            "without(worth[good], area[good])",
            "worth[good]",
            "test_best_of_n.py::test_a_sample_is_not_chosen_for_its_size_where_area_is_held",
        ),
        (
            "a control that chooses bad samples",
            ".where(worth.isfinite(), torch.nan)",
            "",
            "test_best_of_n.py::test_a_control_chooses_by_lot",
        ),
        (
            "what was left learned instead of the best",
            "samples.trajectory.take(chosen)",
            "samples.trajectory.take(chosen - 1)",
            "test_best_of_n.py::test_what_was_chosen_becomes_likelier",
        ),
        (
            "exact views that are not learned",
            "pictures = self.with_exact_views(",
            "_ = self.with_exact_views(",
            "test_best_of_n.py::test_exact_views_are_what_is_learned",
        ),
        (
            "samples that nothing is learned from",
            "self.prompts.fill_epoch(1,",
            "self.prompts.fill_epoch(2,",
            "test_best_of_n.py::test_exact_views_are_what_is_learned",
        ),
        (
            "exact views in the place of the noise",
            "latents[:, -1] =",
            "latents[:, 0] =",
            "test_best_of_n.py::test_exact_views_are_those_of_the_caption",
        ),
        (
            "the same exact views in every epoch",
            "OBJECTS, epoch",
            "OBJECTS, 0",
            "test_best_of_n.py::test_exact_views_are_those_of_the_caption",
        ),
    ),
    *_in(
        "tiny/exact_gradient.py",
        ("growth that is climbed", "- self.area_control.penalty() *", "+ self.area_control.penalty() *", _DIRECTION),
        ("area that is climbed", "without(wanted, area)", "wanted", _DIRECTION),
        (
            "a direction of the last samples alone",
            "torch.lerp(totals, self.means, MOMENTUM)",
            "totals",
            "test_exact_gradient.py::test_the_direction_is_a_mean_over_updates",
        ),
        (
            "gradients followed downhill",
            "set_gradient(self.parameters, -self",
            "set_gradient(self.parameters, self",
            "test_exact_gradient.py::test_an_update_climbs",
        ),
        (
            "a first epoch that moves the painter",
            "if epoch == 0:",
            "if False:",
            "test_exact_gradient.py::test_an_update_climbs",
        ),
        (
            "exact gradients of one step more",
            "max(0, trajectory.num_steps - steps_back)",
            "max(0, trajectory.num_steps - steps_back - 1)",
            _EXACT,
        ),
        (
            "exact gradients of the wrong sign",
            "totals[n] += parameters_to_vector(found)",
            "totals[n] -= parameters_to_vector(found)",
            _EXACT,
        ),
    ),
    *_in(
        "config/batches.py",
        (
            "gradients of matching said to be taken while painting",
            ' and config.train.objective == "ddpo"',
            "",
            "test_config.py::test_batch_table_tells_when_gradients_are_taken",
        ),
    ),
    *_in(
        "tools/curate_prompts.py",
        (
            "curated without comparing cameras",
            "    check_cameras(config)\n",
            "",
            "test_house.py::test_every_command_that_judges_a_painter_compares_their_cameras",
        ),
        (
            "samples of a candidate that are all the same",
            "EVALUATION, index, s)",
            "EVALUATION, index, 0)",
            "test_curate_prompts.py::test_samples_are_painted_in_batches",
        ),
    ),
    *_in(
        "tools/show_scene.py",
        (
            "the background is looked at",
            "views, judge = reward.prepared(views), reward.judge",
            "judge = reward.judge",
            "test_show_scene.py::test_the_background_is_removed_as_for_a_reward",
        ),
        (
            "16 bits taken for 8",
            'if mode[0] in "IF":',
            "if False:",
            "test_show_scene.py::test_bad_pictures_get_one_sentence",
        ),
    ),
    *_in(
        "ddpo/evaluation.py",
        (
            "where the chain starts does not count",
            '"pretrained.", "sample.",',
            '"pretrained.",',
            "test_evaluate.py::test_what_samples_depend_on",
        ),
    ),
    *_in(
        "tiny/training.py",
        (
            "a training of other options is resumed",
            "    if differing:",
            "    if False:",
            "test_tiny_world.py::test_a_folder_with_a_training_of_other_options_is_refused",
        ),
    ),
]
