// The part of ONNX Runtime's C interface that this program calls, for machines that have the library without its header.
//
// OrtApi is a table of function pointers whose order never changes; later versions only append to it. Slots that are
// not called have no type here.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtEnv;
struct OrtStatus;
struct OrtMemoryInfo;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtEpDevice;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
enum ONNXTensorElementDataType { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 };

struct OrtApi {
  const void* slots_0_1[2];
  const char* (*GetErrorMessage)(const OrtStatus*);                            // 2
  OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv**);        // 3
  const void* slots_4_6[3];
  OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);  // 7
  const void* slot_8;
  OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs,
                    size_t inputs_count, const char* const* output_names, size_t outputs_count, OrtValue** outputs);  // 9
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);                     // 10
  const void* slots_11_48[38];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                                               size_t rank, ONNXTensorElementDataType, OrtValue**);  // 49
  const void* slot_50;
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void** data);                  // 51
  const void* slots_52_68[17];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);  // 69
  const void* slots_70_91[22];
  void (*ReleaseEnv)(OrtEnv*);                                                 // 92
  void (*ReleaseStatus)(OrtStatus*);                                           // 93
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*);                                   // 94
  void (*ReleaseSession)(OrtSession*);                                         // 95
  void (*ReleaseValue)(OrtValue*);                                             // 96
  const void* slots_97_99[3];
  void (*ReleaseSessionOptions)(OrtSessionOptions*);                           // 100
  const void* slots_101_129[29];
  OrtStatus* (*AddSessionConfigEntry)(OrtSessionOptions*, const char* key, const char* value);  // 130
  const void* slots_131_300[170];
  OrtStatus* (*RegisterExecutionProviderLibrary)(OrtEnv*, const char* name, const char* path);  // 301
  const void* slot_302;
  OrtStatus* (*GetEpDevices)(const OrtEnv*, const OrtEpDevice* const** devices, size_t* count);  // 303
  OrtStatus* (*SessionOptionsAppendExecutionProvider_V2)(OrtSessionOptions*, OrtEnv*, const OrtEpDevice* const* devices,
                                                         size_t devices_count, const char* const* keys,
                                                         const char* const* values, size_t options_count);  // 304
  const void* slots_305_311[7];
  const char* (*EpDevice_EpName)(const OrtEpDevice*);                          // 312
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

const OrtApiBase* OrtGetApiBase(void);
}

static_assert(offsetof(OrtApi, Run) == 9 * sizeof(void*), "slot of Run");
static_assert(offsetof(OrtApi, CreateTensorWithDataAsOrtValue) == 49 * sizeof(void*), "slot of CreateTensor...");
static_assert(offsetof(OrtApi, CreateCpuMemoryInfo) == 69 * sizeof(void*), "slot of CreateCpuMemoryInfo");
static_assert(offsetof(OrtApi, AddSessionConfigEntry) == 130 * sizeof(void*), "slot of AddSessionConfigEntry");
static_assert(offsetof(OrtApi, EpDevice_EpName) == 312 * sizeof(void*), "slot of EpDevice_EpName");
