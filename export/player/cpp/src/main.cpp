// neodragon_runner BUNDLE OUT [CHIPSET [RUNS]]: check the recorded calls of all graphs, RUNS times each, then make the
// recorded video from its encoded prompt; OUT/latents.bin (float32) and OUT/frames.bin (bytes) have the
// layout of vectors/video.*. CHIPSET runs its context binaries on the HTP; without it, or with "cpu", the portable graphs
// run on the CPU. Output lines: "canary GRAPH DB", "load GRAPH MS", "run GRAPH MS".

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

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

// Runs the recorded call of a graph; throws unless it gives the recorded result.
void check_call(const Bundle& bundle, const std::string& name, const Session& session, int runs) {
  using Clock = std::chrono::steady_clock;
  const auto [inputs, expected] = bundle.call(name);
  std::printf("load %s %.2f\n", name.c_str(), session.load_ms());
  Tensors outputs;
  for (int i = 0; i < runs; ++i) {
    const auto begin = Clock::now();
    outputs = session.run(inputs);
    const std::chrono::duration<double, std::milli> taken = Clock::now() - begin;
    std::printf("run %s %.2f\n", name.c_str(), taken.count());
  }
  const Json& vector = bundle.manifest()["graphs"][name]["vector"];
  double lowest = 300;
  for (const Json& compared : vector["compared"].items()) {
    lowest = std::fmin(lowest, snr_db(expected.at(compared.text()), outputs.at(compared.text())));
  }
  std::printf("canary %s %.2f\n", name.c_str(), lowest);
  if (!(lowest >= vector["minimum_db"].number())) {
    throw std::runtime_error(name + ": computes another result than recorded; update the runtime, or run with cpu");
  }
}

// Checks the recorded calls of all graphs, those of the text encoders and of the first frame included, which the video does
// not run. The graphs of a phase are loaded together, as for a video.
void check_calls(const Bundle& bundle, int runs) {
  std::set<std::string> checked;
  for (const Json& phase : bundle.manifest()["phases"].items()) {
    std::vector<std::string> graphs;
    for (const Json& graph : phase["graphs"].items()) graphs.push_back(graph.text());
    const Sessions sessions = open_graphs(bundle, graphs);
    for (const std::string& graph : graphs) check_call(bundle, graph, *sessions.at(graph), runs);
    checked.insert(graphs.begin(), graphs.end());
  }
  for (const auto& [name, graph] : bundle.manifest()["graphs"].members()) {
    if (!checked.count(name)) throw std::runtime_error("manifest.json: \"phases\" does not name " + name);
  }
}

int run(const std::string& folder, const std::string& out, const std::string& chipset, int runs) {
  const Bundle bundle(folder, chipset);
  check_supported(bundle);
  check_calls(bundle, runs);
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
  // A program that reads the lines gets each at once, and an error after them.
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);
  int status = 2;
  try {
    const std::string chipset = argc > 3 ? argv[3] : "cpu";
    const int runs = argc > 4 ? std::max(std::atoi(argv[4]), 1) : 1;
    status = neodragon::run(argv[1], argv[2], chipset == "cpu" ? "" : chipset, runs);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
  }
  // QNN's clean-up can crash after all work is done.
  std::fflush(nullptr);
  std::_Exit(status);
}
