#include "json.h"

#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

namespace neodragon {
namespace {

constexpr int kMostDepth = 64;

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error("manifest.json: " + what); }

}  // namespace

class JsonParser {
 public:
  explicit JsonParser(const std::string& text) : text_(text) {}

  Json document() {
    Json value = parse_value(0);
    skip_space();
    if (at_ != text_.size()) fail("text after the document");
    return value;
  }

 private:
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\r\n", text_[at_])) ++at_;
  }

  void expect(char wanted) {
    skip_space();
    if (peek() != wanted) fail(std::string("expected '") + wanted + "' at byte " + std::to_string(at_));
    ++at_;
  }

  bool take(char wanted) {
    skip_space();
    if (peek() != wanted) return false;
    ++at_;
    return true;
  }

  Json parse_value(int depth) {
    if (depth > kMostDepth) fail("nested too deeply");
    skip_space();
    Json value;
    switch (peek()) {
      case '{':
        value.kind_ = Json::Kind::kObject;
        parse_object(value, depth);
        break;
      case '[':
        value.kind_ = Json::Kind::kList;
        parse_list(value, depth);
        break;
      case '"':
        value.kind_ = Json::Kind::kText;
        value.text_ = parse_text();
        break;
      default:
        parse_word_or_number(value);
    }
    return value;
  }

  void parse_object(Json& value, int depth) {
    expect('{');
    if (take('}')) return;
    do {
      skip_space();
      std::string key = parse_text();
      expect(':');
      value.members_.emplace_back(std::move(key), parse_value(depth + 1));
    } while (take(','));
    expect('}');
  }

  void parse_list(Json& value, int depth) {
    expect('[');
    if (take(']')) return;
    do {
      value.items_.push_back(parse_value(depth + 1));
    } while (take(','));
    expect(']');
  }

  void parse_word_or_number(Json& value) {
    for (const char* word : {"null", "true", "false"}) {
      if (text_.compare(at_, std::strlen(word), word) == 0) {
        at_ += std::strlen(word);
        value.kind_ = *word == 'n' ? Json::Kind::kNull : Json::Kind::kBoolean;
        value.number_ = *word == 't';
        return;
      }
    }
    const char* start = text_.c_str() + at_;
    char* end = nullptr;
    value.number_ = std::strtod(start, &end);
    if (end == start) fail("no value at byte " + std::to_string(at_));
    value.kind_ = Json::Kind::kNumber;
    value.text_.assign(start, static_cast<size_t>(end - start));
    at_ += value.text_.size();
  }

  std::string parse_text() {
    expect('"');
    std::string out;
    while (peek() != '"') {
      if (at_ >= text_.size()) fail("a text does not end");
      char next = text_[at_++];
      if (next == '\\') {
        parse_escape(out);
      } else {
        out.push_back(next);
      }
    }
    ++at_;
    return out;
  }

  void parse_escape(std::string& out) {
    static const char* const kFrom = "\"\\/bfnrt";
    static const char* const kTo = "\"\\/\b\f\n\r\t";
    const char kind = peek();
    ++at_;
    if (kind != 'u') {
      const char* found = kind ? std::strchr(kFrom, kind) : nullptr;
      if (!found) fail("an unknown escape");
      out.push_back(kTo[found - kFrom]);
      return;
    }
    const unsigned long code = std::strtoul(text_.substr(at_, 4).c_str(), nullptr, 16);
    at_ += 4;
    // Only of prompts, which this program does not read; pairs of surrogates are kept apart.
    if (code < 0x80) {
      out.push_back(static_cast<char>(code));
    } else if (code < 0x800) {
      out.push_back(static_cast<char>(0xC0 | (code >> 6)));
      out.push_back(static_cast<char>(0x80 | (code & 0x3F)));
    } else {
      out.push_back(static_cast<char>(0xE0 | (code >> 12)));
      out.push_back(static_cast<char>(0x80 | ((code >> 6) & 0x3F)));
      out.push_back(static_cast<char>(0x80 | (code & 0x3F)));
    }
  }

  const std::string& text_;
  size_t at_ = 0;
};

Json Json::parse(const std::string& text) { return JsonParser(text).document(); }

bool Json::has(const std::string& key) const {
  for (const auto& member : members_) {
    if (member.first == key) return true;
  }
  return false;
}

const Json& Json::operator[](const std::string& key) const {
  for (const auto& member : members_) {
    if (member.first == key) return member.second;
  }
  fail("\"" + key + "\" is missing");
}

const std::vector<Json>& Json::items() const {
  if (kind_ != Kind::kList) fail("a value is not a list");
  return items_;
}

const std::vector<std::pair<std::string, Json>>& Json::members() const {
  if (kind_ != Kind::kObject) fail("a value is not an object");
  return members_;
}

const std::string& Json::text() const {
  if (kind_ != Kind::kText) fail("a value is not a text");
  return text_;
}

double Json::number() const {
  if (kind_ != Kind::kNumber || !std::isfinite(number_)) fail("a value is not a number");
  return number_;
}

int Json::whole() const {
  const double value = number();
  if (value < 0 || value > INT32_MAX || value != std::floor(value)) fail("a value is not a whole number");
  return static_cast<int>(value);
}

uint64_t Json::whole64() const {
  if (kind_ != Kind::kNumber || text_.find_first_not_of("0123456789") != std::string::npos) {
    fail("a value is not a whole number");
  }
  errno = 0;
  const unsigned long long value = std::strtoull(text_.c_str(), nullptr, 10);
  if (errno == ERANGE) fail("a whole number is too large");
  return value;
}

std::vector<int64_t> Json::shape() const {
  std::vector<int64_t> sizes;
  for (const Json& item : items()) sizes.push_back(item.whole());
  return sizes;
}

}  // namespace neodragon
