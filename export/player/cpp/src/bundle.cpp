#include "bundle.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>

#include "chipsets.h"

namespace neodragon {

namespace {
// Version of the format of manifest.json.
constexpr int64_t kVersion = 2;

// The chipset of a bundle with a name; throws unless there are binaries for it.
std::string named(const std::string& folder, const Json& manifest, const std::string& name) {
  const std::string chipset = find_chipset(manifest["chipsets"], name);
  for (const Json& binary : manifest["binaries"].items()) {
    if (binary["chipset"].text() == chipset) return chipset;
  }
  std::string known;
  for (const auto& [key, entry] : manifest["chipsets"].members()) known += (known.empty() ? "" : ", ") + key;
  throw std::runtime_error(folder + ": has no binaries for " + name + ", only for " +
                           (known.empty() ? "no chipset" : known) + "; export for this chipset, or run with cpu");
}

}  // namespace

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<float> read_floats(const std::string& path) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  std::vector<float> numbers(static_cast<size_t>(file.tellg()) / sizeof(float));
  file.seekg(0);
  file.read(reinterpret_cast<char*>(numbers.data()), static_cast<std::streamsize>(numbers.size() * sizeof(float)));
  return numbers;
}

void write_bytes(const std::string& path, const void* data, size_t bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(data), static_cast<std::streamsize>(bytes));
  if (!file) throw std::runtime_error(path + ": cannot be written");
}

Bundle::Bundle(const std::string& folder, const std::string& chipset)
    : folder_(folder), manifest_(Json::parse(read_text(folder + "/manifest.json"))) {
  if (manifest_["schema"].text() != "neodragon-bundle" || manifest_["version"].whole() != kVersion) {
    throw std::runtime_error(folder + ": not a bundle of version " + std::to_string(kVersion) +
                             "; export it again, or use the runner that came with its exporter");
  }
  if (!chipset.empty()) chipset_ = named(folder, manifest_, chipset);
}

std::string Bundle::model(const std::string& graph) const {
  if (!chipset_.empty()) return path(binary(graph)["graphs"][graph]["wrapper"].text());
  return path(manifest_["graphs"][graph]["portable"].items().at(0).text());
}

std::vector<const Json*> Bundle::binaries() const {
  std::vector<const Json*> found;
  for (const Json& binary : manifest_["binaries"].items()) {
    if (binary["chipset"].text() == chipset_) found.push_back(&binary);
  }
  return found;
}

const Json& Bundle::binary(const std::string& graph) const {
  for (const Json* binary : binaries()) {
    if ((*binary)["graphs"].has(graph)) return *binary;
  }
  throw std::runtime_error(graph + ": the bundle has no binary of it for " + chipset_);
}

std::vector<std::string> Bundle::stage_graphs() const {
  std::vector<std::string> names;
  for (const Json& stage : manifest_["denoiser"]["stages"].items()) names.push_back(stage["graph"].text());
  return names;
}

std::vector<std::vector<std::string>> Bundle::by_binary(const std::vector<std::string>& graphs) const {
  std::vector<std::vector<std::string>> groups;
  if (chipset_.empty()) {
    for (const std::string& graph : graphs) groups.push_back({graph});
    return groups;
  }
  std::vector<const Json*> seen;
  for (const std::string& graph : graphs) {
    const Json* found = &binary(graph);
    if (std::find(seen.begin(), seen.end(), found) != seen.end()) continue;
    seen.push_back(found);
    groups.emplace_back();
    for (const auto& [name, entry] : (*found)["graphs"].members()) {
      if (std::find(graphs.begin(), graphs.end(), name) != graphs.end()) groups.back().push_back(name);
    }
  }
  return groups;
}

Tensor Bundle::table(const std::string& name) const {
  const Json& entry = manifest_["tables"][name];
  Tensor tensor{entry["shape"].shape(), read_floats(path(entry["file"].text()))};
  if (tensor.data.size() != Tensor::count(tensor.shape)) throw std::runtime_error(name + ": not of the table's size");
  return tensor;
}

std::pair<Tensors, Tensors> Bundle::call(const std::string& graph) const {
  const Json& entry = manifest_["graphs"][graph];
  const std::vector<float> numbers = read_floats(path(entry["vector"]["file"].text()));
  std::pair<Tensors, Tensors> call;
  size_t start = 0;
  for (const char* kind : {"inputs", "outputs"}) {
    for (const auto& [name, tensor] : entry[kind].members()) {
      const std::vector<int64_t> shape = tensor["shape"].shape();
      const size_t stop = start + Tensor::count(shape);
      if (stop > numbers.size()) throw std::runtime_error(graph + ": the recorded call is too short");
      Tensors& side = *kind == 'i' ? call.first : call.second;
      side[name] = {shape, {numbers.begin() + static_cast<long>(start), numbers.begin() + static_cast<long>(stop)}};
      start = stop;
    }
  }
  return call;
}

}  // namespace neodragon
