// Chipsets of a bundle by all their names, as the Python player's chipsets.py finds them.
#pragma once

#include <string>

#include "json.h"

namespace neodragon {

// The chipset of a manifest's "chipsets" with a name, or an empty text: a model number, also with a grade (SM8750-AB), or
// one of the aliases. Letter case does not matter.
std::string find_chipset(const Json& chipsets, const std::string& name);

}  // namespace neodragon
