// What the unit tests share: expectations that report and go on, and main(). A test is a function whose name says what
// holds; the program prints one line for each and exits with 1 when any expectation of any failed.
#pragma once

#include <cstdio>
#include <exception>
#include <functional>
#include <initializer_list>
#include <source_location>
#include <string>
#include <string_view>

#include "core/errors.h"

namespace hxcomm::test {

inline int failures = 0;

inline void expect(bool holds, const std::string& what,
                   const std::source_location where = std::source_location::current()) {
  if (holds) return;
  ++failures;
  std::printf("FAILED: line %u: expected %s\n", static_cast<unsigned>(where.line()), what.c_str());
}

// `act` throws an Error of `kind` whose message contains each of `parts`.
inline void expect_error(ErrorKind kind, std::initializer_list<std::string_view> parts,
                         const std::function<void()>& act,
                         const std::source_location where = std::source_location::current()) {
  try {
    act();
  } catch (const Error& error) {
    expect(error.kind() == kind, "another kind of error than " + std::to_string(static_cast<int>(error.kind())), where);
    for (const std::string_view part : parts)
      expect(error.message().find(part) != std::string::npos,
             "'" + std::string(part) + "' in the message: " + error.message(), where);
    return;
  }
  expect(false, "an error, but nothing was thrown", where);
}

struct Test {
  const char* name;
  void (*run)();
};

inline int run(std::initializer_list<Test> tests) {
  std::setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // a killed program's last line says where it was
  for (const Test& each : tests) {
    const int before = failures;
    try {
      each.run();
    } catch (const std::exception& error) {
      expect(false, std::string("no exception: ") + error.what());
    }
    std::printf("%-80s %s\n", each.name, failures == before ? "ok" : "FAILED");
  }
  return failures > 0 ? 1 : 0;
}

}  // namespace hxcomm::test
