// A bundle on disk. Its files are trusted: the copying program compares them with the hashes of the manifest.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "json.h"
#include "tensor.h"

namespace neodragon {

class Bundle {
 public:
  // `chipset` is the one whose context binaries run, by any of its names; empty runs the portable graphs on the CPU.
  explicit Bundle(const std::string& folder, const std::string& chipset = "");

  const Json& manifest() const { return manifest_; }
  // Its name in the manifest.
  const std::string& chipset() const { return chipset_; }
  std::string path(const std::string& file) const { return folder_ + "/" + file; }
  // The ONNX file of a graph: portable, or the one that wraps its context binary.
  std::string model(const std::string& graph) const;
  // Graphs of the denoiser's stages.
  std::vector<std::string> stage_graphs() const;
  // Graphs in groups that share a binary, in its order.
  std::vector<std::vector<std::string>> by_binary(const std::vector<std::string>& graphs) const;
  // Entries of the chipset's context binaries.
  std::vector<const Json*> binaries() const;
  // The entry of the context binary that holds a graph.
  const Json& binary(const std::string& graph) const;
  Tensor table(const std::string& name) const;
  // Inputs and outputs of a graph's recorded call.
  std::pair<Tensors, Tensors> call(const std::string& graph) const;

 private:
  std::string folder_, chipset_;
  Json manifest_;
};

// All numbers of a file of little-endian float32.
std::vector<float> read_floats(const std::string& path);
std::string read_text(const std::string& path);
void write_bytes(const std::string& path, const void* data, size_t bytes);

}  // namespace neodragon
