#include "session.h"

#ifdef NEODRAGON_OFFICIAL_HEADER
#include <onnxruntime_c_api.h>
#else
#include "onnxruntime_abi.h"
#endif

#include <stdexcept>

namespace neodragon {
namespace {

const OrtApi& api() {
  static const OrtApi* const kApi = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (!kApi) throw std::runtime_error("ONNX Runtime is too old; use the version of the manifest or a newer one");
  return *kApi;
}

void check(OrtStatus* status, const std::string& graph) {
  if (!status) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw std::runtime_error(graph + ": " + message);
}

OrtEnv* environment() {
  static OrtEnv* const kEnvironment = [] {
    OrtEnv* made = nullptr;
    check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "neodragon", &made), "environment");
    return made;
  }();
  return kEnvironment;
}

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

// Makes a session run on the HTP and nowhere else.
void use_htp(OrtSessionOptions* options, const Json& binary, const std::string& graph) {
  std::vector<const char*> keys = {"backend_path"}, values = {"libQnnHtp.so"};
  for (const auto& [key, value] : binary["provider_options"].members()) {
    keys.push_back(key.c_str());
    values.push_back(value.text().c_str());
  }
  for (const auto& [key, value] : binary["session_options"].members()) {
    check(api().AddSessionConfigEntry(options, key.c_str(), value.text().c_str()), graph);
  }
  check(api().SessionOptionsAppendExecutionProvider(options, "QNN", keys.data(), values.data(), keys.size()), graph);
}

}  // namespace

Session::Session(const Bundle& bundle, const std::string& graph) : graph_(graph) {
  const Json& entry = bundle.manifest()["graphs"][graph];
  inputs_ = read_specs(entry["inputs"]);
  outputs_ = read_specs(entry["outputs"]);
  OrtSessionOptions* options = nullptr;
  check(api().CreateSessionOptions(&options), graph);
  if (!bundle.chipset().empty()) use_htp(options, bundle.binary(graph), graph);
  OrtStatus* status = api().CreateSession(environment(), bundle.model(graph).c_str(), options, &session_);
  api().ReleaseSessionOptions(options);
  check(status, graph);
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

}  // namespace neodragon
