// ONNX Runtime and QNN of this process.
#pragma once

#ifdef NEODRAGON_OFFICIAL_HEADER
#include <onnxruntime_c_api.h>
#else
#include "onnxruntime_abi.h"
#endif

#include <string>

#include "bundle.h"

namespace neodragon {

// The interface of ONNX Runtime; throws if it is too old for it.
const OrtApi& api();
// Throws the error of a call, if it is one, with a subject.
void check(OrtStatus* status, const std::string& subject);
OrtEnv* environment();

// Throws unless ONNX Runtime is at least as new as the bundle's minimum, and for context binaries QNN's SDK as the one that
// compiled them: an older one fails late, or computes something else. The message names both versions.
void check_runtime(const Bundle& bundle);

// Makes a session run on the HTP and nowhere else. Throws if QNN's libraries or the HTP are missing.
void use_htp(OrtSessionOptions* options, const Json& provider_options, const std::string& graph);

}  // namespace neodragon
