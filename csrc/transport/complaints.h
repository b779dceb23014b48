// What came from outside and was ignored: said on stderr once a kind and sender, so that nobody can flood the log.
#pragma once

#include <cstddef>
#include <cstdio>
#include <mutex>
#include <set>
#include <string>

namespace hxcomm {

class Complaints {
 public:
  // "hxcomm: ignored <what> from <whom> (further ones are not reported)"; `sender` is what counts as the same one.
  void ignored(const std::string& what, const std::string& sender, const std::string& whom) {
    std::lock_guard lock(mutex_);
    if (said_.size() >= kMost || !said_.insert(what + " " + sender).second) return;
    std::fprintf(stderr, "hxcomm: ignored %s from %s (further ones are not reported)\n", what.c_str(), whom.c_str());
  }

 private:
  static constexpr size_t kMost = 256;
  std::mutex mutex_;
  std::set<std::string> said_;
};

}  // namespace hxcomm
