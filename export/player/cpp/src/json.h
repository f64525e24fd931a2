// A reader for JSON documents of known structure: a missing key or a value of another kind throws std::runtime_error.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace neodragon {

class Json {
 public:
  // Parses a document.
  static Json parse(const std::string& text);

  bool is_null() const { return kind_ == Kind::kNull; }
  bool has(const std::string& key) const;
  const Json& operator[](const std::string& key) const;
  const std::vector<Json>& items() const;
  // Members of an object, in the order of the document.
  const std::vector<std::pair<std::string, Json>>& members() const;
  const std::string& text() const;
  double number() const;
  // A whole number in 0..2^31 - 1.
  int whole() const;
  // A whole number in 0..2^64 - 1, all of whose digits count: a double holds 53 bits.
  uint64_t whole64() const;
  std::vector<int64_t> shape() const;

 private:
  enum class Kind { kNull, kBoolean, kNumber, kText, kList, kObject };
  friend class JsonParser;

  Kind kind_ = Kind::kNull;
  double number_ = 0;
  std::string text_;  // of a number its digits
  std::vector<Json> items_;
  std::vector<std::pair<std::string, Json>> members_;
};

}  // namespace neodragon
