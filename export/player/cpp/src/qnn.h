// QNN's libraries, which the loader finds by name: in LD_LIBRARY_PATH, or among the libraries of an app.
#pragma once

#include <string>

namespace neodragon {

// The file of a library that exports a symbol; it stays loaded. Throws if it does not load, with the remedy.
std::string library_file(const char* name, const char* symbol);

// The file of the library that drives the HTP.
std::string htp_library();
// The version of the QNN SDK that it belongs to, such as v2.51.0.260929181845.
std::string qnn_sdk();

}  // namespace neodragon
