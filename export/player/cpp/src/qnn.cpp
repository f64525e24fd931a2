#include "qnn.h"

#include <dlfcn.h>

#include <cstdint>
#include <filesystem>
#include <stdexcept>

namespace neodragon {
namespace {

constexpr const char* kHtp = "libQnnHtp.so";
constexpr const char* kProviders = "QnnInterface_getProviders";

// The start of QNN's interface of major version 2, of which only the function for its version is called. Later minor
// versions append to it.
struct QnnVersion {
  uint32_t major, minor, patch;
};
struct QnnInterface {
  uint32_t backend;
  const char* provider;
  QnnVersion core, own;
  void (*const slots_0_3[4])();
  uint64_t (*get_build_id)(const char** id);  // 4
};
constexpr uint32_t kMajor = 2;

void* symbol_of(const char* library, const char* symbol) {
  void* const handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
  void* const found = handle ? dlsym(handle, symbol) : nullptr;
  if (found) return found;
  const char* const reason = dlerror();
  throw std::runtime_error(std::string(library) + ": cannot be loaded (" + (reason ? reason : symbol) +
                           "); put the libraries of onnxruntime-qnn into LD_LIBRARY_PATH (an ONNX Runtime with QNN built "
                           "in does not have them), or run with cpu");
}

}  // namespace

std::string library_file(const char* name, const char* symbol) {
  Dl_info info;
  if (!dladdr(symbol_of(name, symbol), &info) || !info.dli_fname) return name;
  return std::filesystem::absolute(info.dli_fname).string();
}

std::string htp_library() { return library_file(kHtp, kProviders); }

std::string qnn_sdk() {
  using GetProviders = uint64_t (*)(const QnnInterface*** providers, uint32_t* count);
  const auto get_providers = reinterpret_cast<GetProviders>(symbol_of(kHtp, kProviders));
  const QnnInterface** providers = nullptr;
  uint32_t count = 0;
  if (get_providers(&providers, &count) == 0) {
    for (uint32_t i = 0; i < count; ++i) {
      const char* id = nullptr;
      if (providers[i]->core.major == kMajor && providers[i]->get_build_id(&id) == 0 && id) return id;
    }
  }
  throw std::runtime_error(std::string(kHtp) + ": does not tell its version; use that of the manifest's onnxruntime-qnn");
}

}  // namespace neodragon
