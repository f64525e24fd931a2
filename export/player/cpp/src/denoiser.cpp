#include "denoiser.h"

#include <algorithm>
#include <stdexcept>

#include "noise.h"
#include "pyramid.h"
#include "session.h"

namespace neodragon {
namespace {

// Modulation vectors of each timestep, by the name of its sinusoid.
using Modulation = std::map<std::string, Tensors>;

Modulation modulate(const Bundle& bundle, const Tensor& pooled) {
  const Sessions sessions = open_graphs(bundle, {"denoiser_modulation"});
  const Session& graph = *sessions.at("denoiser_modulation");
  Modulation vectors;
  for (const Json& stage : bundle.manifest()["denoiser"]["stages"].items()) {
    for (const char* kind : {"first_unit_steps", "steps"}) {
      for (const Json& step : stage[kind].items()) {
        const std::string& name = step["sinusoid"].text();
        if (!vectors.count(name)) vectors[name] = graph.run({{"timestep", bundle.table(name)}, {"pooled", pooled}});
      }
    }
  }
  return vectors;
}

// Adds rotary embedding and attention bias of a unit: from tables, with the padded rows where text is padding.
void add_place(const Bundle& bundle, const Json& unit, const Tensor& mask, Tensors& inputs) {
  for (const auto& [name, entry] : unit.members()) {
    Tensor tensor = bundle.table(entry["table"].text());
    if (entry.has("padded")) {
      const Tensor padded = bundle.table(entry["padded"].text());
      const size_t row = tensor.data.size() / static_cast<size_t>(tensor.shape.at(1));
      for (size_t token = 0; token < mask.data.size(); ++token) {
        if (mask.data[token] == 0.0f) std::copy_n(&padded.data[token * row], row, &tensor.data[token * row]);
      }
    }
    inputs[name] = std::move(tensor);
  }
}

class Generation {
 public:
  Generation(const Bundle& bundle, const Prompt& prompt, uint64_t seed)
      : bundle_(bundle),
        denoiser_(bundle.manifest()["denoiser"]),
        prompt_(prompt),
        seed_(seed),
        patch_(denoiser_["patch"].whole()),
        modulation_(modulate(bundle, prompt.pooled)),
        graphs_(open_graphs(bundle, bundle.stage_graphs())) {}

  std::vector<Tensor> run(const Tensor* first_frame) const {
    const Json& video = bundle_.manifest()["video"];
    const std::vector<int64_t> shape = {video["latent_height"].whole(), video["latent_width"].whole(),
                                        video["latent_channels"].whole()};
    std::vector<Tensor> latents(static_cast<size_t>(video["latent_frames"].whole()), Tensor::zeros(shape));
    if (first_frame) latents[0] = *first_frame;
    for (size_t unit = first_frame ? 1 : 0; unit < latents.size(); ++unit) {
      const std::vector<Json>& stages = denoiser_["stages"].items();
      Tensor x{shape, normals(seed_, Purpose::kInitial, static_cast<int>(unit), 0, Tensor::count(shape))};
      for (size_t coarser = 1; coarser < stages.size(); ++coarser) {
        x = down(x);
        for (float& number : x.data) number *= 2.0f;  // keeps unit variance
      }
      for (size_t stage = 0; stage < stages.size(); ++stage) {
        if (stage > 0) x = enter(x, stages[stage], static_cast<int>(unit), static_cast<int>(stage));
        x = denoise(x, stage, unit, latents);
      }
      latents[unit] = std::move(x);
    }
    return latents;
  }

 private:
  // Carries a finished stage into the next one.
  Tensor enter(const Tensor& x, const Json& stage, int unit, int number) const {
    Tensor larger = up(x);
    const Tensor white{larger.shape, normals(seed_, Purpose::kBlock, unit, number, larger.data.size())};
    const Tensor noise = color_noise(white, denoiser_["gamma"].number());
    const float alpha = static_cast<float>(stage["enter"]["alpha"].number());
    const float beta = static_cast<float>(stage["enter"]["beta"].number());
    for (size_t i = 0; i < larger.data.size(); ++i) larger.data[i] = alpha * larger.data[i] + beta * noise.data[i];
    return larger;
  }

  // Returns x at the end of a stage.
  Tensor denoise(Tensor x, size_t number, size_t unit, const std::vector<Tensor>& latents) const {
    const Json& stage = denoiser_["stages"].items()[number];
    std::vector<float> history;
    for (const Json& entry : stage["history"].items()) {
      append_patches(past_frame(latents, unit, entry), patch_, history);
    }
    Tensors inputs = {{"text", prompt_.text}};
    add_place(bundle_, stage["units"].items().at(unit), prompt_.mask, inputs);
    for (const Json& step : stage[unit == 0 ? "first_unit_steps" : "steps"].items()) {
      std::vector<float> patches = history;
      append_patches(x, patch_, patches);
      inputs["patches"] = {{static_cast<int64_t>(patches.size())}, std::move(patches)};
      for (const auto& [name, vector] : modulation_.at(step["sinusoid"].text())) inputs[name] = vector;
      const Tensor flow = from_patches(graphs_.at(stage["graph"].text())->run(inputs).at("flow").data, patch_, x.shape);
      const float length =
          static_cast<float>(step["next_level"].number()) - static_cast<float>(step["level"].number());
      for (size_t i = 0; i < x.data.size(); ++i) x.data[i] = x.data[i] + length * flow.data[i];
    }
    return x;
  }

  // A frame of the history at its size for a stage; zeros before the video.
  Tensor past_frame(const std::vector<Tensor>& latents, size_t unit, const Json& entry) const {
    const size_t distance = static_cast<size_t>(entry["distance"].whole());
    Tensor frame = distance <= unit ? latents[unit - distance] : Tensor::zeros(latents[0].shape);
    const size_t stages = denoiser_["stages"].items().size();
    for (size_t level = static_cast<size_t>(entry["stage"].whole()) + 1; level < stages; ++level) frame = down(frame);
    return frame;
  }

  const Bundle& bundle_;
  const Json& denoiser_;
  const Prompt& prompt_;
  const uint64_t seed_;
  const int patch_;
  const Modulation modulation_;
  const Sessions graphs_;
};

}  // namespace

void check_supported(const Bundle& bundle) {
  const Json& denoiser = bundle.manifest()["denoiser"];
  if (denoiser["guidance"].is_null() && denoiser["first_guidance"].is_null()) return;
  throw std::runtime_error(
      "this bundle uses guidance, which this runner does not support; export a distilled student, or use the Python player");
}

std::vector<Tensor> generate_latents(const Bundle& bundle, const Prompt& prompt, uint64_t seed, const Tensor* first_frame) {
  check_supported(bundle);
  return Generation(bundle, prompt, seed).run(first_frame);
}

}  // namespace neodragon
