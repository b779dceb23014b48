#include "transport/wire_security.h"

#include <cstring>

#include "core/errors.h"

namespace hxcomm {
namespace {

constexpr size_t kStateBytes = 512;  // libsodium says 256

}  // namespace

FrameTags::FrameTags(const Key& mac_key, const Nonce& sender, const Nonce& receiver) : sodium_(&SodiumLibrary::load()) {
  if (sodium_->onetimeauth_poly1305_statebytes() > kStateBytes)
    throw Error(ErrorKind::init, "libsodium's Poly1305 state is larger than hxcomm knows");
  // Nonces are fresh in every process, and a lost connection is never made again: a direction's key counts from 0 once.
  static constexpr char kPurpose[] = "hxcomm wire 1";
  std::array<uint8_t, sizeof kPurpose + 2 * sizeof(Nonce)> text;
  std::memcpy(text.data(), kPurpose, sizeof kPurpose);
  std::memcpy(text.data() + sizeof kPurpose, sender.data(), sender.size());
  std::memcpy(text.data() + sizeof kPurpose + sender.size(), receiver.data(), receiver.size());
  sodium_->auth_hmacsha256(key_.data(), text.data(), text.size(), mac_key.data());
}

Tag FrameTags::next(const FrameHeader& header, const void* payload, size_t nbytes) const {
  std::array<uint8_t, 12> nonce{};
  std::memcpy(nonce.data() + 4, &counter_, sizeof counter_);
  Key once;
  sodium_->stream_chacha20_ietf(once.data(), once.size(), nonce.data(), key_.data());
  alignas(64) std::array<unsigned char, kStateBytes> state;
  sodium_->onetimeauth_poly1305_init(state.data(), once.data());
  sodium_->onetimeauth_poly1305_update(state.data(), reinterpret_cast<const unsigned char*>(&header), sizeof header);
  sodium_->onetimeauth_poly1305_update(state.data(), static_cast<const unsigned char*>(payload), nbytes);
  Tag tag;
  sodium_->onetimeauth_poly1305_final(state.data(), tag.data());
  return tag;
}

bool equal_in_constant_time(const Tag& a, const Tag& b) {
  uint8_t difference = 0;
  for (size_t i = 0; i < a.size(); ++i) difference = static_cast<uint8_t>(difference | (a[i] ^ b[i]));
  return difference == 0;
}

}  // namespace hxcomm
