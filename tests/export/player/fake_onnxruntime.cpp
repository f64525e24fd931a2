// Replaces ONNX Runtime (LD_PRELOAD): prints every session that is opened and closed, and answers each call with the
// recorded outputs. FAKE_VECTORS is the folder of the recorded calls; FAKE_SIZES has lines "GRAPH OUTPUT BYTES".

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"

struct OrtEnv {};
struct OrtMemoryInfo {};
struct OrtStatus {};
struct OrtEpDevice {};
struct OrtSession {
  std::string graph;
};
struct OrtSessionOptions {
  std::map<std::string, std::string> entries;
};
struct OrtValue {
  std::vector<char> own;
  void* data;
  size_t bytes;
};

namespace {

OrtEnv environment;
OrtMemoryInfo memory;
const OrtEpDevice device{};
const OrtEpDevice* const devices[] = {&device};

size_t output_bytes(const std::string& graph, const std::string& output) {
  std::ifstream file(std::getenv("FAKE_SIZES"));
  std::string of, name;
  size_t bytes;
  while (file >> of >> name >> bytes) {
    if (of == graph && name == output) return bytes;
  }
  return 0;
}

OrtStatus* open_session(const OrtEnv*, const char* path, const OrtSessionOptions* options, OrtSession** session) {
  const std::string graph = std::filesystem::path(path).stem();
  std::printf("open %s", graph.c_str());
  for (const char* key : {"ep.share_ep_contexts", "ep.stop_share_ep_contexts"}) {
    if (options->entries.count(key)) std::printf(" %s", key);
  }
  std::printf("\n");
  *session = new OrtSession{graph};
  return nullptr;
}

void close_session(OrtSession* session) {
  std::printf("close %s\n", session->graph.c_str());
  delete session;
}

OrtStatus* run(OrtSession* session, const OrtRunOptions*, const char* const*, const OrtValue* const* inputs,
               size_t inputs_count, const char* const* names, size_t count, OrtValue** outputs) {
  std::ifstream file(std::string(std::getenv("FAKE_VECTORS")) + "/" + session->graph + ".bin", std::ios::binary);
  const std::vector<char> recorded{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  size_t start = 0;
  for (size_t i = 0; i < inputs_count; ++i) start += inputs[i]->bytes;
  for (size_t i = 0; i < count; ++i) {
    const size_t stop = start + output_bytes(session->graph, names[i]);
    outputs[i] = new OrtValue{{recorded.begin() + start, recorded.begin() + stop}, nullptr, stop - start};
    outputs[i]->data = outputs[i]->own.data();
    start = stop;
  }
  return nullptr;
}

const OrtApi* get_api(uint32_t) {
  static OrtApi api{};
  api.CreateEnv = [](OrtLoggingLevel, const char*, OrtEnv** made) { return *made = &environment, (OrtStatus*)nullptr; };
  api.CreateSession = open_session;
  api.ReleaseSession = close_session;
  api.Run = run;
  api.CreateSessionOptions = [](OrtSessionOptions** made) { return *made = new OrtSessionOptions, (OrtStatus*)nullptr; };
  api.ReleaseSessionOptions = [](OrtSessionOptions* options) { delete options; };
  api.AddSessionConfigEntry = [](OrtSessionOptions* options, const char* key, const char* value) {
    return options->entries[key] = value, (OrtStatus*)nullptr;
  };
  api.CreateCpuMemoryInfo = [](OrtAllocatorType, OrtMemType, OrtMemoryInfo** made) {
    return *made = &memory, (OrtStatus*)nullptr;
  };
  api.ReleaseMemoryInfo = [](OrtMemoryInfo*) {};
  api.CreateTensorWithDataAsOrtValue = [](const OrtMemoryInfo*, void* data, size_t bytes, const int64_t*, size_t,
                                          ONNXTensorElementDataType, OrtValue** made) {
    return *made = new OrtValue{{}, data, bytes}, (OrtStatus*)nullptr;
  };
  api.GetTensorMutableData = [](OrtValue* value, void** data) { return *data = value->data, (OrtStatus*)nullptr; };
  api.ReleaseValue = [](OrtValue* value) { delete value; };
  api.RegisterExecutionProviderLibrary = [](OrtEnv*, const char*, const char*) { return (OrtStatus*)nullptr; };
  api.GetEpDevices = [](const OrtEnv*, const OrtEpDevice* const** found, size_t* count) {
    return *found = devices, *count = std::getenv("FAKE_NO_HTP") ? 0 : 1, (OrtStatus*)nullptr;
  };
  api.EpDevice_EpName = [](const OrtEpDevice*) { return "QNNExecutionProvider"; };
  api.SessionOptionsAppendExecutionProvider_V2 = [](OrtSessionOptions*, OrtEnv*, const OrtEpDevice* const*, size_t,
                                                    const char* const*, const char* const*,
                                                    size_t) { return (OrtStatus*)nullptr; };
  return &api;
}

const OrtApiBase base = {get_api, [] { return "99.0.0"; }};

}  // namespace

const OrtApiBase* OrtGetApiBase() { return &base; }
