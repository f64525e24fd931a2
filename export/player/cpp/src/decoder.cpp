#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "session.h"

namespace neodragon {
namespace {

uint8_t to_byte(float pixel) {
  // The conversion of NaN to a byte is undefined.
  if (!std::isfinite(pixel)) {
    throw std::runtime_error("video_decoder: a frame has numbers that are not finite; run with cpu, and report the chip");
  }
  return static_cast<uint8_t>(std::clamp(pixel, -1.0f, 1.0f) * 127.5f + 127.5f);
}

}  // namespace

std::vector<uint8_t> decode(const Bundle& bundle, const std::vector<Tensor>& latents) {
  const Json& video = bundle.manifest()["video"];
  const Json& statistics = video["normalization"];
  const Sessions sessions = open_graphs(bundle, {"video_decoder"});
  const Session& graph = *sessions.at("video_decoder");
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
  return frames;
}

}  // namespace neodragon
