#include "session.h"

#include <chrono>
#include <stdexcept>

#include "runtime.h"

namespace neodragon {
namespace {

// Values that are released together.
struct Values {
  std::vector<OrtValue*> values;
  explicit Values(size_t count) : values(count, nullptr) {}
  ~Values() {
    for (OrtValue* value : values) {
      if (value) api().ReleaseValue(value);
    }
  }
};

using Specs = std::vector<std::pair<std::string, std::vector<int64_t>>>;

Specs read_specs(const Json& tensors) {
  Specs specs;
  for (const auto& [name, tensor] : tensors.members()) specs.emplace_back(name, tensor["shape"].shape());
  return specs;
}

// Makes a session run a context binary. `last` ends the sharing of the binary, which is process-wide.
void use_binary(OrtSessionOptions* options, const Json& binary, const std::string& graph, bool last) {
  for (const auto& [key, value] : binary["session_options"].members()) {
    check(api().AddSessionConfigEntry(options, key.c_str(), value.text().c_str()), graph);
  }
  if (last && binary["session_options"].has("ep.share_ep_contexts")) {
    check(api().AddSessionConfigEntry(options, "ep.stop_share_ep_contexts", "1"), graph);
  }
  use_htp(options, binary["provider_options"], graph);
}

}  // namespace

Session::Session(const Bundle& bundle, const std::string& graph, bool last) : graph_(graph) {
  const auto start = std::chrono::steady_clock::now();
  const Json& entry = bundle.manifest()["graphs"][graph];
  inputs_ = read_specs(entry["inputs"]);
  outputs_ = read_specs(entry["outputs"]);
  OrtSessionOptions* made = nullptr;
  check(api().CreateSessionOptions(&made), graph);
  const std::unique_ptr<OrtSessionOptions, void (*)(OrtSessionOptions*)> options(made, api().ReleaseSessionOptions);
  if (!bundle.chipset().empty()) use_binary(made, bundle.binary(graph), graph, last);
  check(api().CreateSession(environment(), bundle.model(graph).c_str(), made, &session_), graph);
  load_ms_ = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
}

Session::~Session() {
  if (session_) api().ReleaseSession(session_);
}

Tensors Session::run(const Tensors& inputs) const {
  OrtMemoryInfo* memory = nullptr;
  check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory), graph_);
  Values taken(inputs_.size()), given(outputs_.size());
  std::vector<const char*> input_names, output_names;
  for (size_t i = 0; i < inputs_.size(); ++i) {
    const auto& [name, shape] = inputs_[i];
    const auto found = inputs.find(name);
    if (found == inputs.end() || found->second.data.size() != Tensor::count(shape)) {
      api().ReleaseMemoryInfo(memory);
      throw std::runtime_error(graph_ + ": input " + name + " is missing or of another size");
    }
    // ONNX Runtime does not write to inputs.
    float* data = const_cast<float*>(found->second.data.data());
    check(api().CreateTensorWithDataAsOrtValue(memory, data, found->second.data.size() * sizeof(float), shape.data(),
                                               shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &taken.values[i]),
          graph_);
    input_names.push_back(name.c_str());
  }
  api().ReleaseMemoryInfo(memory);
  for (const auto& output : outputs_) output_names.push_back(output.first.c_str());
  check(api().Run(session_, nullptr, input_names.data(), taken.values.data(), input_names.size(), output_names.data(),
                  output_names.size(), given.values.data()),
        graph_);
  Tensors outputs;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    void* data = nullptr;
    check(api().GetTensorMutableData(given.values[i], &data), graph_);
    const float* numbers = static_cast<const float*>(data);
    const auto& [name, shape] = outputs_[i];
    outputs[name] = {shape, {numbers, numbers + Tensor::count(shape)}};
  }
  return outputs;
}

Sessions open_graphs(const Bundle& bundle, const std::vector<std::string>& graphs) {
  check_runtime(bundle);
  Sessions sessions;
  for (const std::vector<std::string>& group : bundle.by_binary(graphs)) {
    for (const std::string& graph : group) {
      sessions[graph].reset(new Session(bundle, graph, graph == group.back()));
    }
  }
  return sessions;
}

}  // namespace neodragon
