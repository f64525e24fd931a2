// neodragon_runner BUNDLE OUT [CHIPSET [RUNS]]: check the recorded calls of denoiser and decoder, RUNS times each, then
// make the recorded video from its encoded prompt; OUT/latents.bin (float32) and OUT/frames.bin (bytes) have the
// layout of vectors/video.*. CHIPSET runs its context binaries on the HTP; without it, or with "cpu", the portable graphs
// run on the CPU. Output lines: "canary GRAPH DB", "load GRAPH MS", "run GRAPH MS".

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <stdexcept>
#include <string>

#include "bundle.h"
#include "decoder.h"
#include "denoiser.h"
#include "session.h"

namespace neodragon {
namespace {

// 20 log10(|reference| / |reference - got|); 300 where they are equal, -300 where one of them is not finite.
double snr_db(const Tensor& reference, const Tensor& got) {
  double signal = 0, noise = 0;
  for (size_t i = 0; i < reference.data.size(); ++i) {
    const double wanted = reference.data[i], error = wanted - got.data[i];
    signal += wanted * wanted;
    noise += error * error;
  }
  if (!std::isfinite(noise)) return -300;  // std::fmax drops NaN
  return std::fmin(300, 10 * std::log10(std::fmax(signal, 1e-60) / std::fmax(noise, 1e-60)));
}

// Returns whether the recorded call of a graph gives the recorded result.
bool check_call(const Bundle& bundle, const std::string& name, int runs) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) {
    return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
  };
  const auto [inputs, expected] = bundle.call(name);
  const auto start = Clock::now();
  const Session session(bundle, name);
  std::printf("load %s %.2f\n", name.c_str(), since(start));
  Tensors outputs;
  for (int i = 0; i < runs; ++i) {
    const auto begin = Clock::now();
    outputs = session.run(inputs);
    std::printf("run %s %.2f\n", name.c_str(), since(begin));
  }
  const Json& vector = bundle.manifest()["graphs"][name]["vector"];
  double lowest = 300;
  for (const Json& compared : vector["compared"].items()) {
    lowest = std::fmin(lowest, snr_db(expected.at(compared.text()), outputs.at(compared.text())));
  }
  std::printf("canary %s %.2f\n", name.c_str(), lowest);
  return lowest >= vector["minimum_db"].number();
}

int run(const std::string& folder, const std::string& out, const std::string& chipset, int runs) {
  const Bundle bundle(folder, chipset);
  for (const auto& [name, graph] : bundle.manifest()["graphs"].members()) {
    const bool ours = name.rfind("denoiser", 0) == 0 || name == "video_decoder";
    if (ours && !check_call(bundle, name, runs)) {
      throw std::runtime_error(name + ": computes another result than recorded; update the runtime, or run with cpu");
    }
  }
  const Json& video = bundle.manifest()["vectors"]["video"];
  const Json& recorded = video["prompt_tables"];
  const Prompt prompt = {bundle.table(recorded["text"].text()), bundle.table(recorded["mask"].text()),
                         bundle.table(recorded["pooled"].text())};
  Tensor first;
  const bool given = !recorded["first_frame"].is_null();
  if (given) first = bundle.table(recorded["first_frame"].text());
  const std::vector<Tensor> latents =
      generate_latents(bundle, prompt, video["seed"].whole64(), given ? &first : nullptr);
  std::vector<float> numbers;
  for (const Tensor& frame : latents) numbers.insert(numbers.end(), frame.data.begin(), frame.data.end());
  const std::vector<uint8_t> frames = decode(bundle, latents);
  std::filesystem::create_directories(out);
  write_bytes(out + "/latents.bin", numbers.data(), numbers.size() * sizeof(float));
  write_bytes(out + "/frames.bin", frames.data(), frames.size());
  std::printf("%zu latent frames, %zu bytes of frames in %s\n", latents.size(), frames.size(), out.c_str());
  return 0;
}

}  // namespace
}  // namespace neodragon

int main(int argc, char** argv) {
  if (argc < 3 || argc > 5) {
    std::fprintf(stderr, "usage: neodragon_runner BUNDLE OUT [CHIPSET [RUNS]]\n");
    return 2;
  }
  try {
    const std::string chipset = argc > 3 ? argv[3] : "cpu";
    const int runs = argc > 4 ? std::max(std::atoi(argv[4]), 1) : 1;
    return neodragon::run(argv[1], argv[2], chipset == "cpu" ? "" : chipset, runs);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
