// Latents to frames.
#pragma once

#include <cstdint>

#include "bundle.h"
#include "tensor.h"

namespace neodragon {

// Returns the frames of normalized latents as RGB bytes, [F, H, W, 3], in the size of super-resolution if the bundle has
// it. Throws if a number of a frame is not finite.
std::vector<uint8_t> decode(const Bundle& bundle, const std::vector<Tensor>& latents);

}  // namespace neodragon
