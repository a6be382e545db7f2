// The kernels by which the emulator is judged, by name.
#pragma once

#include <map>
#include <string>

// Runs a kernel; true if it left the right result.
using Cases = std::map<std::string, bool (*)()>;

Cases cluster_cases();
