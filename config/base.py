"""Every key of a run: its meaning, its unit, its default. The defaults are the paper's (Carve3D, on top of DDPO).

A run is configured by one of
    --config config/tiny.py                      the small world, any machine
    --config config/dgx.py:carve3d_train         the paper's run
    --config config/dgx.py:kl_coefficient(0.1)   one point of the paper's sweeps
and any key below can be changed behind it: --config.train.learning_rate=1e-3.

"A process" is one GPU (or one CPU worker). An epoch is one round of sampling followed by the updates on those samples.
The configuration is locked: a misspelled key or a value of another type is an error where it is written.
config/validate.py knows which values are allowed and refuses the others before any model is loaded.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """All keys with the paper's values, locked; `pretrained.model` and `recon.checkpoint` are the user's to give."""
    config = ConfigDict()

    ###### General ######
    # Name of the run's folder below logdir, and of the run in the tracker. "" = made from date and time.
    config.run_name = ""
    # Seed of everything random: LoRA initialisation, prompts, latents, noise, shuffling. Integer >= 0.
    config.seed = 42
    # Folder that holds the runs' folders.
    config.logdir = "logs"
    # Epochs in all, counting the first one, which only fills the trackers and makes no update.
    config.num_epochs = 55
    # A checkpoint every so many epochs.
    config.save_freq = 1
    # Validation every so many epochs; there is always one before training.
    config.val_freq = 30
    # How many checkpoints stay on disk; the oldest are removed first.
    config.num_checkpoint_limit = 5
    # Arithmetic of the networks: "no" (float32), "fp16" (GPU only) or "bf16". LoRA weights, log-probabilities and the
    # optimizer stay in float32 whatever is chosen.
    config.mixed_precision = "fp16"
    # Let Ampere and later GPUs round float32 matrix products to TF32: faster, about three decimal digits.
    config.allow_tf32 = True
    # Resume a run in its folder: a checkpoint folder, a run's folder (its newest checkpoint), or "auto" = the newest
    # good checkpoint of the run that run_name names, or a new run if there is none, so that the same command starts and
    # resumes it. "" = start a new one. What is trained must be as in that run (painter.name, use_lora, lora.*,
    # train.use_8bit_adam), and what its rewards measure: the validation prompts, reward_fn, and how views are painted,
    # reconstructed and compared.
    config.resume_from = ""
    # When the newest checkpoint of the run's folder is damaged: False = stop and say so, True = use the one before it.
    config.resume_previous_if_damaged = False
    # Stop the run when this many samples of an epoch, or more, have NaN or infinite numbers. Fewer are left out, with a
    # warning, and saved in bad_samples/. 1 = stop at the first.
    config.max_bad_samples = 8
    # Only algorithms that give the same bits every time: a resumed run is then bitwise equal on GPUs too, which are
    # slower for it, and a layer that has no such algorithm is an error. CPUs give the same bits in any case.
    config.deterministic = False
    # True: train small low-rank matrices beside the frozen UNet. False: train the whole UNet (needs a second, frozen
    # copy as KL reference, many times the memory, and a smaller learning rate).
    config.use_lora = True
    # Experiment tracker: "wandb" (offline unless the user is logged in), "tensorboard" or "none". metrics.jsonl and
    # curves.png are written in any case.
    config.tracker = "wandb"
    # At the end of the run write report.html into its folder, a page that shows it without a network, as
    # python -m tools.report does.
    config.report = False
    # Diagnostic: give every sample the advantage of a random other one. Nothing can be learned from that, so what a run
    # with this key "improves" is what chance and drift improve.
    config.shuffle_advantages = False

    ###### Painter: the multi-view diffusion model that is finetuned ######
    config.painter = ConfigDict()
    # Which kind of multi-view model: "mv_sdxl" = SDXL that paints 4 views as a 2x2 grid (Instant3D style), "mvdream" =
    # SD 2.1 that paints 4 separate views which attend to each other, conditioned on cameras.
    config.painter.name = "mv_sdxl"
    # Only "mvdream": height of its cameras above the horizon, degrees, [0, 90); it was trained on 0 to 30.
    config.painter.elevation = 0.0
    # Only "mvdream": azimuth of its first camera, degrees [0, 360) as MVDream counts them; the others follow every 90.
    config.painter.azimuth_start = 0.0
    # Only "mvdream": the prompt of the unconditional branch of the guidance. (SDXL gets zeros there.)
    config.painter.negative_prompt = ""

    config.pretrained = ConfigDict()
    # The painter's weights: a folder in diffusers format, or a hub id such as "someone/some-model"; for "mvdream" also
    # the original file sd-v2.1-base-4view.pt. tools/convert_instant3d.py makes a folder of Instant3D's. Must be given.
    config.pretrained.model = ""
    # Branch, tag or commit of a hub id; ignored for a folder.
    config.pretrained.revision = "main"
    # Folder with CLIP's tokenizer, needed only for that .pt file, which has none.
    config.pretrained.tokenizer = ""
    # Another VAE for the same latents: a folder, or a hub id (its main branch) such as "madebyollin/sdxl-vae-fp16-fix",
    # which unlike SDXL's own can be used in half precision. "" = the one that comes with the model.
    config.pretrained.vae = ""
    # Folder of a LoRA that is fused into the painter before anything else, so that painter + LoRA is the base model
    # (and the KL reference) of this run. "" = none.
    config.pretrained.lora = ""

    config.lora = ConfigDict()
    # Inner dimension of the low-rank matrices.
    config.lora.rank = 4
    # Which UNet layers get them: "attention" (to_q, to_k, to_v, to_out.0) or "attention+conv" (convolutions and
    # further linear layers too: about twice the signal in a small UNet).
    config.lora.targets = "attention"

    ###### Prompts ######
    config.prompts = ConfigDict()
    # Text files with one prompt per line, or threestudio's prompt_library.json.
    # Training prompts: what an epoch's samples are drawn from.
    config.prompts.train_file = "prompts/train_candidates.txt"
    # Validation prompts: painted with fixed noise every val_freq epochs.
    config.prompts.val_file = "prompts/validation.txt"
    # Test prompts, kept apart for the end: a run only checks that they are there, and tools.evaluate paints them. The
    # paper's are the 415 DreamFusion prompts, which are not shipped: put a copy at prompts/dreamfusion_415.txt (or
    # .json) and name it here.
    config.prompts.test_file = "prompts/test.txt"
    # How many training prompts, from the top of train_file. 0 = all.
    config.prompts.num_train = 30

    ###### Sampling ######
    config.sample = ConfigDict()
    # Denoising steps per sample.
    config.sample.num_steps = 100
    # Noise level of DDIM in training: 1.0 = as noisy as DDPM. Above 0, for without noise there is no log-probability.
    config.sample.eta = 1.0
    # Classifier-free guidance weight, the same for sampling and for the update. 1.0 = no guidance.
    config.sample.guidance_scale = 5.0
    # Bring the contrast of guided predictions back towards the unguided ones (Lin et al. 2023), 0 = off ... 1 = fully.
    config.sample.guidance_rescale = 0.0
    # Samples per epoch over all processes. The number of batches follows from it, so that a run has the same epochs on
    # any number of processes. 0 = not prescribed: give num_batches_per_epoch.
    config.sample.total_batch_size = 768
    # Samples that one process paints at a time; where gradients are taken while painting (see below) only in the first
    # epoch and in validations, and train.batch_size in all other epochs. When the number of batches is derived this is
    # an upper bound: the largest divisor of the process's samples that is not above it is taken.
    config.sample.batch_size = 8
    # Batches per process and epoch. 0 = derived from total_batch_size; a number given here wins over it.
    config.sample.num_batches_per_epoch = 0
    # Samples (of 4 views, or one grid of them) that the VAE decodes at a time. The VAE of SDXL takes 3 GB for each in
    # float32, so this bounds the memory; it changes no result.
    config.sample.decode_batch_size = 8
    # Where the denoising starts: "noise", or, for "mv_sdxl" only, "gaussian_blob" = noise around four Gaussian blobs,
    # one in the middle of each view, as Instant3D was published.
    config.sample.initial_latents = "noise"
    # Only "gaussian_blob": standard deviation of a blob, in sides of a view, (0, 1].
    config.sample.blob_std = 0.1
    # Text appended to every prompt before the painter reads it, such as ", white background". Rewards and trackers
    # see the prompt without it.
    config.sample.prompt_suffix = ""
    # Objects in one picture below samples/: painted views over re-rendered ones. 0 = no pictures there. Validations
    # keep the views of every prompt in any case.
    config.sample.save_images = 8

    ###### Update ######
    config.train = ConfigDict()
    # Samples per optimizer step over all processes; equal to sample.total_batch_size = purely on-policy (one step per
    # epoch). Half or a third of it = two or three rounds of PPO. 0 = not prescribed: give gradient_accumulation_steps.
    config.train.total_batch_size = 768
    # Samples in one forward and backward pass of one process; at most that many when the accumulation is derived.
    config.train.batch_size = 4
    # Micro-batches per optimizer step and process (the timesteps of a sample are accumulated as well). 0 = derived from
    # total_batch_size; a number given here wins over it.
    config.train.gradient_accumulation_steps = 0
    # Compute the UNet's blocks again in the backward pass instead of keeping all that it needs of them: a third more
    # arithmetic in the update for a quarter of its memory, and the same gradients.
    config.train.gradient_checkpointing = False
    # Keep Adam's moments in 8 bits: needs bitsandbytes and a GPU.
    config.train.use_8bit_adam = False
    # AdamW: step size, decay rates of the two moments, decoupled weight decay, and the term that keeps the division
    # finite. With kl_per_update > 0 the step size is only where the calibration starts.
    config.train.learning_rate = 3e-4
    config.train.adam_beta1 = 0.9
    config.train.adam_beta2 = 0.999
    config.train.adam_weight_decay = 1e-4
    config.train.adam_epsilon = 1e-8
    # Longest gradient (L2 norm over all trained weights) that is not scaled down.
    config.train.max_grad_norm = 1.0
    # Passes over the samples of an epoch. 1 = each sample is used once.
    config.train.num_inner_epochs = 1
    # What becomes likelier where the advantage is positive, and unlikelier where it is negative: "ddpo" = the path that
    # was taken, by the log-probabilities of its steps (published); "awm" = the picture that it led to, by how well the
    # model foretells it from fresh noise at the levels of the same steps (advantage-weighted matching).
    config.train.objective = "ddpo"
    # Use the guidance of the sampling in the update (DDPO's key). Must be True for "ddpo", which would else score
    # another policy than the one that sampled; "awm" may match without. For no guidance at all set
    # sample.guidance_scale = 1.0.
    config.train.cfg = True
    # Take out of the advantages what they pay for larger objects, and a penalty on what these have grown so far: larger
    # ones survive a reconstruction better, and growth is an easy way to raise the reward (ddpo/area.py).
    config.train.hold_foreground = False
    # Advantages are clamped to +- this many standard deviations.
    config.train.adv_clip_max = 5.0
    # PPO's clip range for the ratio. So small because the log-probability is a mean over the latent's dimensions.
    config.train.clip_range = 1e-4
    # Share of the trainable steps (all but skip_last_steps) that is trained on, (0, 1]; drawn at random for every
    # sample (with gradients taken while painting: for every painted batch, spread evenly, in proportion to their
    # weights).
    config.train.timestep_fraction = 1.0
    # Weight of step t in the loss: "uniform" (published) or "noise" (proportional to sigma_t^2, mean 1). The gradient
    # of a step scales like 1/sigma_t, so with uniform weights the last, nearly noise-free steps drown the others.
    config.train.timestep_weighting = "uniform"
    # How many of the last denoising steps are not trained on at all.
    config.train.skip_last_steps = 0
    # Shuffled timesteps of a micro-batch that share one UNet pass; the gradient is the same, the passes are larger.
    config.train.timesteps_per_forward = 1
    # Take the gradients of the log-probabilities while the samples are painted, train.batch_size at a time, and weight
    # them when the advantages are known: the update then needs no forward passes of its own. Same gradients; only where
    # an epoch has one update, of a LoRA, without the KL in the loss. Otherwise, and with False, as in DDPO.
    config.train.gradients_while_painting = True
    # Step size in what it does instead of what it is: the learning rate is calibrated so that one update moves the
    # policy by this KL, in nats per trajectory, measured in float32 on all trainable steps (all but skip_last_steps).
    # 0 = keep learning_rate.
    config.train.kl_per_update = 0.0
    # In how many of the first updates the learning rate is calibrated; then it stays. Used with kl_per_update > 0.
    config.train.kl_calibration_updates = 3
    # Steps whose length is the share of them that chance does not explain, by what shuffled advantages foretell
    # (ddpo/chance.py): rewards that say nothing of their samples then move nothing. Where chance explains 85 % a step
    # has the length that learning_rate or kl_per_update gives. Used where gradients are taken while painting, and
    # without use_8bit_adam; the first lines of a run say so.
    config.train.beyond_chance = False

    ###### Reward ######
    # "mrc" (multi-view reconstruction consistency), or DDPO's sanity checks "jpeg_compressibility" and
    # "jpeg_incompressibility", which need no reconstructor.
    config.reward_fn = "mrc"

    config.recon = ConfigDict()
    # Sparse-view reconstructor: "tiny_lrm", "lgm", "grm", "openlrm" or "instantmesh".
    config.recon.name = "tiny_lrm"
    # Its weights: a folder or file, or a hub id such as "ashawkey/LGM". Must be given when reward_fn = "mrc".
    config.recon.checkpoint = ""
    # Its arithmetic: "fp32", "bf16" or "fp16" (GPU only).
    config.recon.dtype = "fp32"
    # Where it computes: "" = on the process's own device, or another one, such as "cuda:1" for a run of one process.
    config.recon.device = ""
    # Side of the re-rendered views, pixels.
    config.recon.render_size = 512
    # Most rays rendered at once: bounds the memory, changes no result.
    config.recon.chunk_size = 65536
    # Only "openlrm", which reconstructs from one view at a time: how many of the views, 1 to 4, it reconstructs from.
    # Each scene is compared with the other views; 4 judges every pair of views, 1 is four times cheaper.
    config.recon.input_views = 4
    # Only "instantmesh", which takes any cameras: whose views it gets, "instant3d" or "mvdream" (four views) or
    # "zero123plus" (six, which no painter here paints).
    config.recon.cameras = "instant3d"
    # Only cameras "mvdream": their height above the horizon, degrees, [0, 90); that of painter.elevation.
    config.recon.elevation = 15.0
    # Cut the objects out of the painted views with `rembg` (pip install rembg) before they are judged, for painters
    # that do not paint on white, such as MVDream.
    config.recon.remove_background = False

    config.mrc = ConfigDict()
    # Compare the object's bounding box (published) instead of the whole view.
    config.mrc.bbox_lpips = True
    # A view whose object covers less than this share of its pixels counts as empty, [0, 1).
    config.mrc.min_foreground = 0.005
    # Reward of a sample with an empty view. Below 0, which is a perfect MRC: otherwise painting nothing wins.
    config.mrc.empty_view_reward = -1.0
    # Let the rewards of samples with an empty view enter the statistics that advantages are relative to, as published.
    # False: they get the worst advantage, -train.adv_clip_max, and leave the statistics of their prompts alone. Only
    # with reward_fn = "mrc", whose reward of them is a penalty.
    config.mrc.empty_in_statistics = False
    # LPIPS weights (AlexNet, v0.1). "" = the file that ships with mrc/.
    config.mrc.lpips_checkpoint = ""

    ###### Per-prompt statistics ######
    # Advantages are rewards relative to the same prompt's recent ones. None in a config file, or buffer_size = 0 on
    # the command line: relative to the whole batch.
    config.per_prompt_stat_tracking = ConfigDict()
    # Rewards remembered per prompt; the oldest are dropped first. About three epochs' worth.
    config.per_prompt_stat_tracking.buffer_size = 75
    # Below this many rewards a prompt uses the statistics of the whole batch. The first epoch paints every training
    # prompt this often: 768 samples / 30 prompts.
    config.per_prompt_stat_tracking.min_count = 25

    ###### KL to the base model ######
    # Keep the policy near its base model. Costs one more forward pass per step in sampling.
    config.kl_penalty = True
    # True: subtract it from the reward's advantage (published). False: add kl_beta * KL to the loss.
    config.kl_in_reward = True
    # Weight of the KL in the loss, used with kl_in_reward = False.
    config.kl_beta = 0.001
    # Weight of the KL in the advantage, used with kl_in_reward = True.
    config.kl_normalized_coeff = 0.2
    # Normalise the KL per prompt, as the rewards are, before it is weighted.
    config.kl_per_prompt_stat_tracking = True
    # "log_ratio" (published: unbiased, noisy) or "analytic" (closed form of each step, same expectation, less noise).
    # What restrains a purely on-policy run is the log ratio in the reward, or the closed form in the loss, which costs
    # the update one more forward pass per step. The others hardly do: the log ratio in the loss has no gradient in
    # expectation, and the closed form in the reward none but towards states in which both models agree anyway.
    config.kl_estimator = "log_ratio"
    # Share of the trainable steps (all but train.skip_last_steps, whatever train.timestep_fraction) at which the base
    # model is asked, (0, 1]; drawn for every painted batch, spread evenly, so that the KL keeps its expectation and
    # gets noisier. Validation asks at all of them, and a KL in the loss needs all.
    config.kl_timestep_fraction = 1.0
    # Compute and log the KL even when nothing is penalised.
    config.log_kl = True
    # End the run when an epoch's mean KL reaches this value. 0 = never. The published run was stopped near 3.2e-4.
    config.stop_kl = 0.0

    return config.lock()
