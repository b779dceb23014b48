// Whether the checks that keep a group safe are compiled in. They are, but for the one build that measures what they
// cost: scripts/bench_safety.py.
#pragma once

namespace hxcomm {

#ifdef HXCOMM_UNCHECKED
inline constexpr bool kChecked = false;
#else
inline constexpr bool kChecked = true;
#endif

}  // namespace hxcomm
