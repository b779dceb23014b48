// What the tests of the wire share: hosts of a job in one process, pumped until something holds.
#pragma once

#include <dlfcn.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/clock.h"
#include "tests/expect.h"
#include "transport/wire.h"

namespace hxcomm::test {

inline constexpr int64_t kDeadlineNs = 20'000'000'000;  // far more than is ever needed: a deadline, not an expectation
inline constexpr uint64_t kGroup = 77;
inline constexpr WireSecurity::Mode kModes[] = {WireSecurity::Mode::none, WireSecurity::Mode::curve,
                                                WireSecurity::Mode::mac};

inline Key decoded(const char* z85) {
  uint8_t bytes[33];
  ZmqLibrary::load().z85_decode(bytes, z85);
  Key key;
  std::memcpy(key.data(), bytes, key.size());
  return key;
}

// The keys that a job derives from its secret, here one byte.
inline WireSecurity security_of(WireSecurity::Mode mode, uint8_t secret) {
  const ZmqLibrary& zmq = ZmqLibrary::load();
  WireSecurity security;
  security.mode = mode;
  security.mac_key.fill(secret);
  security.server_secret.fill(secret);
  security.client_secret.fill(static_cast<uint8_t>(secret + 100));
  for (const auto& [hidden, shown] : {std::pair{&security.server_secret, &security.server_public},
                                      std::pair{&security.client_secret, &security.client_public}}) {
    char secret_z85[41], public_z85[41];
    zmq.z85_encode(secret_z85, hidden->data(), hidden->size());
    zmq.curve_public(public_z85, secret_z85);
    *shown = decoded(public_z85);
  }
  return security;
}

struct Frame {
  Nonce from;
  FrameHeader header;
  std::string bytes;
};

struct Records : FrameHandler {
  std::vector<Frame> frames;
  std::vector<std::pair<Nonce, std::string>> losses;
  void on_frame(const Nonce& from, const FrameHeader& header, Payload&& payload) override {
    frames.push_back({from, header, std::string(reinterpret_cast<const char*>(payload.data()), payload.size())});
  }
  void on_lost(const Nonce& process, const std::string& why) override { losses.emplace_back(process, why); }
};

// A process of a job on a host of its own.
struct Host {
  Host(uint8_t first_byte, const WireSecurity& security) : nonce{first_byte} {
    nonce[15] = ++made;  // another one each time: processes have fresh nonces
    wire = std::make_unique<Wire>(nonce, "127.0.0.1", security);
    wire->subscribe(kGroup, records);
  }
  bool is_connected(const Host& other) const { return wire->is_connected(other.nonce); }
  static inline uint8_t made = 0;
  Nonce nonce;
  std::shared_ptr<Records> records = std::make_shared<Records>();
  std::unique_ptr<Wire> wire;
};

// Pumps all until `done`; false where it is not within the deadline.
inline bool pump_until(const std::vector<Host*>& hosts, const std::function<bool()>& done) {
  const int64_t deadline = now_ns() + kDeadlineNs;
  while (!done()) {
    if (now_ns() > deadline) return false;
    bool any = false;
    std::vector<pollfd> fds;
    for (const Host* host : hosts)
      if (host->wire) {
        any = host->wire->pump() || any;
        host->wire->append_pollfds(&fds);
      }
    if (!any) poll(fds.data(), fds.size(), 20);
  }
  return true;
}

inline void expect_connected(Host& a, Host& b, const std::source_location where = std::source_location::current()) {
  a.wire->connect(b.nonce, b.wire->address());
  b.wire->connect(a.nonce, a.wire->address());
  expect(pump_until({&a, &b}, [&] { return a.is_connected(b) && b.is_connected(a); }),
         "a connection; " + a.wire->trouble_of(b.nonce) + "; " + b.wire->trouble_of(a.nonce), where);
}

inline FrameHeader header_of(uint32_t number) {
  FrameHeader header;
  header.type = FrameType::message;
  header.group = kGroup;
  header.number = number;
  header.sequence = 1'000 + number;
  header.source = 3;
  header.destination = 5;
  return header;
}

// Shared objects to load first, as `import zmq` does.
inline void load_libraries(int argc, char** argv) {
  for (int i = 1; i < argc; ++i)
    if (dlopen(argv[i], RTLD_NOW) == nullptr) std::printf("FAILED: %s\n", dlerror());
}

}  // namespace hxcomm::test
