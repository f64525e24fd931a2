"""Folder names in a checkpoint of the released layout; each holds one component or one tokenizer."""

from __future__ import annotations

CLIP_L, CLIP_G, T5 = 'text_encoder', 'text_encoder_2', 'text_encoder_3'
CLIP_L_TOKENIZER, CLIP_G_TOKENIZER, T5_TOKENIZER = 'tokenizer', 'tokenizer_2', 'tokenizer_3'
TOKENIZERS = (CLIP_L_TOKENIZER, CLIP_G_TOKENIZER, T5_TOKENIZER)

VIDEO_VAE = 'causal_video_vae'

# The few-step student, and its multi-step teacher.
STUDENT, STUDENT_ADAPTER = 'diffusion_transformer_320p', 'context_adapter'
TEACHER, TEACHER_ADAPTER = 'diffusion_transformer_320p_multistep_t2v', 'context_adapter_multistep_t2v'
# By mode: hybrid starts from a given first frame, monolithic from noise alone.
DENOISER_FOLDERS = {'hybrid': STUDENT, 'monolithic': TEACHER}
ADAPTER_FOLDERS = {'hybrid': STUDENT_ADAPTER, 'monolithic': TEACHER_ADAPTER}

FIRST_FRAME_UNET, FIRST_FRAME_VAE = 'ssd_1b_unet', 'ssd_1b_vae'
FIRST_FRAME_CLIP_L, FIRST_FRAME_CLIP_G = 'ssd_1b_text_encoder', 'ssd_1b_text_encoder_2'
FIRST_FRAME_TOKENIZERS = ('ssd_1b_tokenizer', 'ssd_1b_tokenizer_2')
# The encoder that takes the ids of each tokenizer.
ENCODER_FOLDERS = {
    CLIP_L_TOKENIZER: CLIP_L,
    CLIP_G_TOKENIZER: CLIP_G,
    T5_TOKENIZER: T5,
    **dict(zip(FIRST_FRAME_TOKENIZERS, (FIRST_FRAME_CLIP_L, FIRST_FRAME_CLIP_G), strict=True)),
}

SAFETY_CHECKER, FEATURE_EXTRACTOR = 'safety_checker', 'feature_extractor'
SUPER_RESOLUTION = 'quicksrnet'

# Not in the release: Pyramid-Flow's denoiser and video VAE, in Pyramid-Flow's layout.
PYRAMID_FLOW, PYRAMID_FLOW_VAE = 'pyramid_flow_dit', 'pyramid_flow_vae'
