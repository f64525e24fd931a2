// One graph on ONNX Runtime.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bundle.h"
#include "tensor.h"

struct OrtSession;

namespace neodragon {

class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Runs the graph; `inputs` may hold more than it takes.
  Tensors run(const Tensors& inputs) const;
  const std::vector<std::pair<std::string, std::vector<int64_t>>>& inputs() const { return inputs_; }
  // Time that loading took.
  double load_ms() const { return load_ms_; }

 private:
  friend std::map<std::string, std::unique_ptr<Session>> open_graphs(const Bundle&, const std::vector<std::string>&);

  // Loads the portable graph on the CPU provider, or the context binary of the bundle's chipset on the HTP. `last` says
  // that no other graph of the binary follows.
  Session(const Bundle& bundle, const std::string& graph, bool last);

  std::string graph_;
  std::vector<std::pair<std::string, std::vector<int64_t>>> inputs_, outputs_;
  double load_ms_ = 0;
  OrtSession* session_ = nullptr;
};

using Sessions = std::map<std::string, std::unique_ptr<Session>>;

// Loads graphs that live together. Those of one binary share its memory, as long as all that a phase needs are opened
// with one call: see "Context binaries" in docs/bundle.md.
Sessions open_graphs(const Bundle& bundle, const std::vector<std::string>& graphs);

}  // namespace neodragon
