"""The dimensions of the nano networks: SD1.5's topology at small width, for 128-pixel portraits."""

PORTRAIT = 128
LATENT_SCALE = 0.18215  # SD1.5's; the VAE's outer 1x1 convolutions are rescaled so that it holds here too
CONTEXT = 128

VAE = dict(
    block_out_channels=(32, 32, 64, 128),
    layers_per_block=1,
    latent_channels=4,
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    sample_size=PORTRAIT,
)

HEADS = 4
UNET = dict(
    sample_size=PORTRAIT // 8,
    block_out_channels=(64, 128, 128, 64),
    layers_per_block=2,
    cross_attention_dim=CONTEXT,
    attention_head_dim=HEADS,  # diffusers reads this as the number of heads for SD1.5-like models
)

CLIP_VISION = dict(
    num_channels=3,
    hidden_size=128,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=64,
    patch_size=8,
    projection_dim=128,
    hidden_act="gelu",
)

ADAPTER = dict(id_dim=512, clip_dim=CLIP_VISION["hidden_size"], dim=CONTEXT, tokens=4, depth=4)

PREDICTION = "v_prediction"
SCHEDULE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, num_train_timesteps=1000)
