// The arithmetic of the pyramid for one frame [H, W, C]: halving, doubling, block noise, patches.
#pragma once

#include "tensor.h"

namespace neodragon {

Tensor down(const Tensor& frame);
Tensor up(const Tensor& frame);
// Block noise of white noise: covariance 1 on the diagonal of each 2x2 block, -gamma off it.
Tensor color_noise(const Tensor& white, double gamma);
// Appends the patches of a frame, row by row; inside a patch row, column, channel.
void append_patches(const Tensor& frame, int patch, std::vector<float>& out);
// The frame of `shape` that patches show.
Tensor from_patches(const std::vector<float>& patches, int patch, const std::vector<int64_t>& shape);

}  // namespace neodragon
