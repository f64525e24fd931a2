// An array of float32 numbers in row-major order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace neodragon {

struct Tensor {
  std::vector<int64_t> shape;
  std::vector<float> data;

  static size_t count(const std::vector<int64_t>& shape) {
    size_t total = 1;
    for (int64_t size : shape) total *= static_cast<size_t>(size);
    return total;
  }
  static Tensor zeros(const std::vector<int64_t>& shape) { return {shape, std::vector<float>(count(shape), 0.0f)}; }
};

using Tensors = std::map<std::string, Tensor>;

}  // namespace neodragon
