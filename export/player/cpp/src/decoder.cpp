#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "session.h"

namespace neodragon {
namespace {

constexpr const char* kDecoder = "video_decoder";
constexpr const char* kEnlarger = "super_resolution";

// Returns a number that a graph gives; its conversion to a byte is undefined if it is not finite.
float finite(float pixel, const char* graph) {
  if (std::isfinite(pixel)) return pixel;
  throw std::runtime_error(std::string(graph) +
                           ": a frame has numbers that are not finite; run with cpu, and report the chip");
}

uint8_t to_byte(float pixel) {
  return static_cast<uint8_t>(std::clamp(finite(pixel, kDecoder), -1.0f, 1.0f) * 127.5f + 127.5f);
}

// Frames of `size` bytes in the size of super-resolution, one call each.
std::vector<uint8_t> enlarge(const Session& graph, const std::vector<uint8_t>& frames, size_t size) {
  const auto& [name, shape] = graph.inputs().at(0);
  std::vector<uint8_t> enlarged;
  for (size_t start = 0; start < frames.size(); start += size) {
    Tensor frame = Tensor::zeros(shape);
    const uint8_t* const first = frames.data() + start;
    std::transform(first, first + size, frame.data.begin(), [](uint8_t byte) { return byte / 255.0f; });
    const Tensors outputs = graph.run({{name, frame}});  // alive in the loop
    for (float pixel : outputs.at("enlarged").data) {
      enlarged.push_back(static_cast<uint8_t>(std::clamp(std::nearbyint(finite(pixel, kEnlarger) * 255), 0.0f, 255.0f)));
    }
  }
  return enlarged;
}

}  // namespace

std::vector<uint8_t> decode(const Bundle& bundle, const std::vector<Tensor>& latents) {
  const Json& video = bundle.manifest()["video"];
  const Json& statistics = video["normalization"];
  std::vector<std::string> graphs = {kDecoder};
  if (bundle.manifest()["graphs"].has(kEnlarger)) graphs.push_back(kEnlarger);
  const Sessions sessions = open_graphs(bundle, graphs);
  const Session& graph = *sessions.at(kDecoder);
  Tensors inputs;
  for (const auto& [name, shape] : graph.inputs()) inputs[name] = Tensor::zeros(shape);
  std::vector<uint8_t> frames;
  for (size_t index = 0; index < latents.size(); ++index) {
    const std::string kind = index == 0 ? "first_" : "";
    const float shift = static_cast<float>(statistics[kind + "shift"].number());
    const float scale = static_cast<float>(statistics[kind + "scale"].number());
    std::transform(latents[index].data.begin(), latents[index].data.end(), inputs["latent"].data.begin(),
                   [=](float number) { return number / scale + shift; });
    Tensors outputs = graph.run(inputs);
    for (float pixel : outputs.at("frames").data) frames.push_back(to_byte(pixel));
    for (auto& [name, memory] : inputs) {
      if (name != "latent") memory = std::move(outputs.at("next_" + name));
    }
  }
  // The first latent stands for one frame of the video, its last.
  const size_t frame = 3 * static_cast<size_t>(video["height"].whole()) * static_cast<size_t>(video["width"].whole());
  const size_t dropped = static_cast<size_t>(video["frames_per_latent"].whole()) - 1;
  frames.erase(frames.begin(), frames.begin() + static_cast<long>(dropped * frame));
  const auto enlarger = sessions.find(kEnlarger);
  return enlarger == sessions.end() ? frames : enlarge(*enlarger->second, frames, frame);
}

}  // namespace neodragon
