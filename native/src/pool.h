// Threads that wait for work. One product at a time uses them; a second caller runs alone.
#pragma once

namespace prunus {

using Part = bool (*)(void* context, int index);

// Calls part(context, i) for i in [0, parts), on up to `parts` threads, this one included.
// False if any part returned false.
bool run_parts(int parts, Part part, void* context);

}  // namespace prunus
