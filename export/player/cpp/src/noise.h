// Portable noise, as neodragon_jax/pyramid/portable_noise.py specifies it: bit for bit the same numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace neodragon {

enum class Purpose : uint32_t { kInitial = 0, kBlock = 1, kPosterior = 2, kPicture = 3, kPictureStep = 4 };

// Returns the first `count` standard normal numbers of one use of noise.
std::vector<float> normals(uint64_t seed, Purpose purpose, int unit, int stage, size_t count);

}  // namespace neodragon
