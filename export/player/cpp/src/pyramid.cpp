#include "pyramid.h"

#include <algorithm>
#include <cmath>

namespace neodragon {

Tensor down(const Tensor& frame) {
  const int64_t height = frame.shape[0] / 2, width = frame.shape[1] / 2, channels = frame.shape[2];
  Tensor out = Tensor::zeros({height, width, channels});
  const auto at = [&](int64_t y, int64_t x, int64_t c) { return frame.data[(y * 2 * width + x) * channels + c]; };
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      for (int64_t c = 0; c < channels; ++c) {
        const float sum = (at(2 * y, 2 * x, c) + at(2 * y, 2 * x + 1, c)) + (at(2 * y + 1, 2 * x, c) + at(2 * y + 1, 2 * x + 1, c));
        out.data[(y * width + x) * channels + c] = sum / 4.0f;
      }
    }
  }
  return out;
}

Tensor up(const Tensor& frame) {
  const int64_t height = frame.shape[0] * 2, width = frame.shape[1] * 2, channels = frame.shape[2];
  Tensor out = Tensor::zeros({height, width, channels});
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const float* from = &frame.data[((y / 2) * (width / 2) + x / 2) * channels];
      std::copy(from, from + channels, &out.data[(y * width + x) * channels]);
    }
  }
  return out;
}

Tensor color_noise(const Tensor& white, double gamma) {
  Tensor out = up(down(white));
  const float rest = static_cast<float>(std::sqrt(1 + gamma));
  const float keep = static_cast<float>(std::sqrt(std::max(0.0, 1 - 3 * gamma)));
  for (size_t i = 0; i < out.data.size(); ++i) {
    const float mean = out.data[i];
    out.data[i] = rest * (white.data[i] - mean) + keep * mean;
  }
  return out;
}

namespace {

// Calls visit(index in the frame, index among the patches) for every number.
template <typename Visit>
void for_each(const std::vector<int64_t>& shape, int patch, Visit visit) {
  const int64_t rows = shape[0] / patch, columns = shape[1] / patch, channels = shape[2];
  size_t index = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      for (int64_t y = row * patch; y < (row + 1) * patch; ++y) {
        for (int64_t x = column * patch; x < (column + 1) * patch; ++x) {
          for (int64_t c = 0; c < channels; ++c) visit(static_cast<size_t>((y * shape[1] + x) * channels + c), index++);
        }
      }
    }
  }
}

}  // namespace

void append_patches(const Tensor& frame, int patch, std::vector<float>& out) {
  const size_t start = out.size();
  out.resize(start + frame.data.size());
  for_each(frame.shape, patch, [&](size_t in_frame, size_t in_patches) { out[start + in_patches] = frame.data[in_frame]; });
}

Tensor from_patches(const std::vector<float>& patches, int patch, const std::vector<int64_t>& shape) {
  Tensor out = Tensor::zeros(shape);
  for_each(shape, patch, [&](size_t in_frame, size_t in_patches) { out.data[in_frame] = patches.at(in_patches); });
  return out;
}

}  // namespace neodragon
