#include "runtime.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <stdexcept>
#include <vector>

#include "qnn.h"

namespace neodragon {
namespace {

// First version of the interface with execution providers as plugins.
constexpr uint32_t kApiVersion = 22;
constexpr const char* kProvider = "QNNExecutionProvider";

// The first three numbers of a dotted version.
std::array<long, 3> numbers(const std::string& version) {
  std::array<long, 3> found = {};
  size_t at = 0;
  for (long& number : found) {
    while (at < version.size() && !std::isdigit(static_cast<unsigned char>(version[at]))) ++at;
    for (; at < version.size() && std::isdigit(static_cast<unsigned char>(version[at])); ++at) {
      number = number * 10 + (version[at] - '0');
    }
  }
  return found;
}

// `reason` says what needs the version.
void check_version(const std::string& subject, const std::string& found, const std::string& needed,
                   const std::string& reason, const std::string& remedy) {
  if (numbers(found) >= numbers(needed)) return;
  throw std::runtime_error(subject + " " + found + " is older than " + needed + ", " + reason + "; " + remedy);
}

// QNN's devices, after its registration with ONNX Runtime.
const std::vector<const OrtEpDevice*>& qnn_devices() {
  static const std::vector<const OrtEpDevice*> kDevices = [] {
    const std::string library = library_file("libonnxruntime_providers_qnn.so", "CreateEpFactories");
    check(api().RegisterExecutionProviderLibrary(environment(), kProvider, library.c_str()), library);
    const OrtEpDevice* const* devices = nullptr;
    size_t count = 0;
    check(api().GetEpDevices(environment(), &devices, &count), library);
    std::vector<const OrtEpDevice*> found;
    std::copy_if(devices, devices + count, std::back_inserter(found),
                 [](const OrtEpDevice* device) { return std::string(api().EpDevice_EpName(device)) == kProvider; });
    if (found.empty()) throw std::runtime_error("onnxruntime-qnn finds no HTP on this machine; run with cpu");
    return found;
  }();
  return kDevices;
}

}  // namespace

const OrtApi& api() {
  static const OrtApi* const kApi = OrtGetApiBase()->GetApi(kApiVersion);
  if (!kApi) throw std::runtime_error("ONNX Runtime is too old; use the version of the manifest or a newer one");
  return *kApi;
}

void check(OrtStatus* status, const std::string& subject) {
  if (!status) return;
  const std::string message = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw std::runtime_error(subject + ": " + message);
}

OrtEnv* environment() {
  static OrtEnv* const kEnvironment = [] {
    OrtEnv* made = nullptr;
    check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "neodragon", &made), "environment");
    return made;
  }();
  return kEnvironment;
}

void check_runtime(const Bundle& bundle) {
  const std::string needed = bundle.manifest()["minimum_runtime"]["onnxruntime"].text();
  check_version("ONNX Runtime", OrtGetApiBase()->GetVersionString(), needed, "the lowest that plays the bundle",
                "use libonnxruntime.so of onnxruntime " + needed + " or newer");
  if (bundle.chipset().empty()) return;
  for (const Json* binary : bundle.binaries()) {
    if (!binary->has("qnn_sdk")) {
      throw std::runtime_error("manifest.json: \"binaries\" does not tell the QNN SDK that made " +
                               (*binary)["file"].text() +
                               "; export the bundle again, or run with cpu");
    }
    check_version("QNN SDK", qnn_sdk(), (*binary)["qnn_sdk"].text(), "which compiled " + (*binary)["file"].text(),
                  "use the libraries of onnxruntime-qnn " + bundle.manifest()["tool_versions"]["onnxruntime-qnn"].text() +
                      " or newer");
  }
}

void use_htp(OrtSessionOptions* options, const Json& provider_options, const std::string& graph) {
  const std::string backend = htp_library();
  std::vector<const char*> keys = {"backend_path"}, values = {backend.c_str()};
  for (const auto& [key, value] : provider_options.members()) {
    keys.push_back(key.c_str());
    values.push_back(value.text().c_str());
  }
  check(api().SessionOptionsAppendExecutionProvider_V2(options, environment(), qnn_devices().data(), 1, keys.data(),
                                                       values.data(), keys.size()),
        graph);
}

}  // namespace neodragon
