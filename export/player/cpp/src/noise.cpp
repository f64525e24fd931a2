#include "noise.h"

#include <cmath>

namespace neodragon {
namespace {

constexpr double kPi = 3.141592653589793, kLog2 = 0.6931471805599453, kSqrtHalf = 0.7071067811865476;

struct Words {
  uint32_t first, second;
};

Words threefry(uint64_t seed, uint32_t index, uint32_t stream) {
  static const int kRotations[2][4] = {{13, 15, 26, 6}, {17, 29, 16, 24}};
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  const uint32_t keys[3] = {low, high, low ^ high ^ 0x1BD11BDAu};
  uint32_t x0 = index + keys[0], x1 = stream + keys[1];
  for (uint32_t block = 0; block < 5; ++block) {
    for (int rotation : kRotations[block % 2]) {
      x0 += x1;
      x1 = (x1 << rotation | x1 >> (32 - rotation)) ^ x0;
    }
    x0 += keys[(block + 1) % 3];
    x1 += keys[(block + 2) % 3] + block + 1;
  }
  return {x0, x1};
}

// The logarithm of n / 2^33, for n below 2^33.
double log_of(uint64_t n) {
  int exponent;
  double mantissa = std::frexp(static_cast<double>(n), &exponent);
  if (mantissa < kSqrtHalf) {
    mantissa = 2.0 * mantissa;
    --exponent;
  }
  const double s = (mantissa - 1.0) / (mantissa + 1.0), square = s * s;
  double sum = 1.0 / 21.0;
  for (int n = 19; n >= 1; n -= 2) sum = sum * square + 1.0 / n;
  return (exponent - 33.0) * kLog2 + 2.0 * s * sum;
}

// sum of (-1)^k x^k / (2 k + odd)! for k = 0..8
double series(double x, int odd) {
  double factorials[9], factorial = 1.0;
  for (int k = 0, n = odd; k < 9; ++k) {
    factorials[k] = factorial;
    factorial = factorial * (n + 1) * (n + 2);
    n += 2;
  }
  double sum = 1.0 / factorials[8];
  for (int k = 7; k >= 0; --k) sum = sum * x + (k % 2 ? -1.0 : 1.0) / factorials[k];
  return sum;
}

}  // namespace

std::vector<float> normals(uint64_t seed, Purpose purpose, int unit, int stage, size_t count) {
  const uint32_t stream =
      static_cast<uint32_t>(purpose) << 24 | static_cast<uint32_t>(unit) << 8 | static_cast<uint32_t>(stage);
  std::vector<float> out(count + count % 2);
  for (size_t i = 0; i < out.size() / 2; ++i) {
    const Words words = threefry(seed, static_cast<uint32_t>(i), stream);
    const double radius = std::sqrt(-2.0 * log_of(2 * static_cast<uint64_t>(words.first) + 1));
    const double rest = words.second & 0x3FFFFFFFu;
    const double x = ((2.0 * rest + 1.0) / 2147483648.0 - 0.5) * (kPi / 2.0), square = x * x;
    const double c = series(square, 0), s = x * series(square, 1);
    const double pairs[4][2] = {{c, s}, {-s, c}, {-c, -s}, {s, -c}};
    for (int half = 0; half < 2; ++half) out[2 * i + half] = static_cast<float>(radius * pairs[words.second >> 30][half]);
  }
  out.resize(count);
  return out;
}

}  // namespace neodragon
