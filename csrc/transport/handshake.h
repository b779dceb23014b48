// How a process gets its peer's segment: an abstract Unix socket, the peer's credentials, a nonce, then the memfd.
//
// Abstract, because a path name would connect across network namespaces and an abstract name does not: two ranks share
// a host exactly when this handshake works between them. The nonce comes from the group's Store, so only members know
// it; the uid of the other side must be ours. Nothing that arrives here is trusted beyond that.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/errors.h"
#include "core/segment.h"

namespace hxcomm {

using Nonce = std::array<uint8_t, 16>;

struct Introduction {
  std::unique_ptr<Mapping> mapping;
  int pid = 0;
  // Owned by the receiver.
  int pidfd = -1;
  int bell = -1;  // an eventfd that wakes the peer's threads where they sleep on descriptors
};

// Nobody listens at the address: that process is not on this host, or has ended.
class NobodyThere : public Error {
 public:
  using Error::Error;
};

// Connects to `address` and returns the mapped segment of the process that listens there.
// Throws Error{init} naming address and cause, NobodyThere among them; takes at most `timeout_ms`.
Introduction introduce(const std::string& address, const Nonce& nonce, int timeout_ms);

// Wakes the watcher of the process that listens at `address`. Does not block, and says nothing of whether it worked.
void knock(const std::string& address);

// The listening side. Driven by the endpoint's watcher thread: never blocks.
class Doorman {
 public:
  // `bell`: handed to visitors with the segment.
  Doorman(std::string address, const Nonce& nonce, const Segment& segment, int bell);
  ~Doorman();
  int listener() const { return listener_; }
  // Accepts one visitor; returns its descriptor (to be watched for input) or -1 when there is none or it is refused.
  int accept_visitor();
  // Answers a visitor whose request arrived and closes it. False where it has hung up without one.
  bool answer(int visitor);
  // Closes the visitors who have said nothing for two seconds. Returns the descriptors closed.
  std::vector<int> dismiss_silent();

 private:
  struct Visitor {
    int fd;
    int64_t since_ns;
  };
  int listener_ = -1;
  Nonce nonce_;
  const Segment& segment_;
  int bell_;
  std::vector<Visitor> visitors_;
};

}  // namespace hxcomm
