// Noise to latents: unit by unit, stage by stage, step by step. Source: arXiv 2410.05954, algorithm 1.
#pragma once

#include <cstdint>

#include "bundle.h"
#include "tensor.h"

namespace neodragon {

// Text conditioning of the denoiser for one prompt.
struct Prompt {
  Tensor text;    // [L, D], states after the context adapter
  Tensor mask;    // [L], 1 for tokens, 0 for padding
  Tensor pooled;  // [1, P], pooled vectors of the two CLIP towers
};

// Throws if the bundle needs what this program does not do: guidance.
void check_supported(const Bundle& bundle);

// Returns the normalized latents of a video, one frame [h, w, C] per unit. `first_frame` is the normalized latent of a
// given first frame, or null.
std::vector<Tensor> generate_latents(const Bundle& bundle, const Prompt& prompt, uint64_t seed, const Tensor* first_frame);

}  // namespace neodragon
