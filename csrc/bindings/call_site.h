// Where in the program a collective is called.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace hxcomm {

// Writes "train.py:41" of the calling thread's innermost Python frame whose file begins with none of `outside`, the
// last characters of it where it is too long; "" where there is no such frame. Takes the GIL.
void write_call_site(char* text, size_t size, const std::vector<std::string>& outside);

}  // namespace hxcomm
