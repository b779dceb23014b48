// Who may speak on the wire: the keys of a job, and the tag that proves a frame in mode mac.
#pragma once

#include <array>
#include <cstdint>

#include "transport/frame.h"

namespace hxcomm {

using Key = std::array<uint8_t, 32>;

struct WireSecurity {
  enum class Mode { none, curve, mac };
  Mode mode = Mode::none;
  Key server_secret{}, server_public{}, client_secret{}, client_public{};  // curve: one pair of pairs for the job
  Key mac_key{};
};

using Tag = std::array<uint8_t, 16>;

// The tags of one direction between two processes: Poly1305 under a key that is used once, ChaCha20's for a counter, as
// in RFC 8439. Both sides count, so that a frame that is forged, changed, left out, doubled or moved has no valid tag.
class FrameTags {
 public:
  FrameTags(const Key& mac_key, const Nonce& sender, const Nonce& receiver);
  // The tag of the direction's next frame; counts only where told to.
  Tag next(const FrameHeader& header, const void* payload, size_t nbytes) const;
  void advance() { ++counter_; }

 private:
  const SodiumLibrary* sodium_;
  Key key_;
  uint64_t counter_ = 0;
};

bool equal_in_constant_time(const Tag& a, const Tag& b);

}  // namespace hxcomm
