#include "chipsets.h"

#include <cctype>
#include <map>
#include <regex>

namespace neodragon {
namespace {

// In lower case, without spaces, hyphens and underscores.
std::string plain(const std::string& name) {
  std::string found;
  for (const unsigned char character : name) {
    if (!std::isspace(character) && character != '-' && character != '_') {
      found += static_cast<char>(std::tolower(character));
    }
  }
  return found;
}

// A model number without its speed grade and package.
std::string without_grade(const std::string& name) {
  static const std::regex kGrade(R"(\s*(.*?\d)(-[1-9])?-?(a[abc]|p)\s*)", std::regex::icase);
  std::smatch parts;
  return std::regex_match(name, parts, kGrade) ? parts[1].str() : name;
}

}  // namespace

std::string find_chipset(const Json& chipsets, const std::string& name) {
  std::map<std::string, std::string> names;
  for (const auto& [chipset, entry] : chipsets.members()) {
    names[plain(chipset)] = chipset;
    if (!entry.has("aliases")) continue;
    for (const Json& alias : entry["aliases"].items()) names[plain(alias.text())] = chipset;
  }
  for (const std::string& spelling : {name, without_grade(name)}) {
    const auto found = names.find(plain(spelling));
    if (found != names.end()) return found->second;
  }
  return "";
}

}  // namespace neodragon
