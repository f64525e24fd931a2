// One graph on ONNX Runtime.
#pragma once

#include <string>
#include <vector>

#include "bundle.h"
#include "tensor.h"

struct OrtSession;

namespace neodragon {

class Session {
 public:
  // Loads the portable graph on the CPU provider, or the context binary of the bundle's chipset on the HTP.
  Session(const Bundle& bundle, const std::string& graph);
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Runs the graph; `inputs` may hold more than it takes.
  Tensors run(const Tensors& inputs) const;
  const std::vector<std::pair<std::string, std::vector<int64_t>>>& inputs() const { return inputs_; }

 private:
  std::string graph_;
  std::vector<std::pair<std::string, std::vector<int64_t>>> inputs_, outputs_;
  OrtSession* session_ = nullptr;
};

}  // namespace neodragon
