// Threads that wait for work. One product at a time uses them; a second caller runs alone.
#pragma once

namespace prunus {

using Part = bool (*)(void* context, int index);

// Calls part(context, i) for i in [0, parts), on up to `parts` threads, this one included.
// False if any part returned false.
bool run_parts(int parts, Part part, void* context);

// GOMP_parallel of an OpenMP runtime: runs `each(data)` on a team, the caller among it.
using Team = void (*)(void (*each)(void*), void* data, unsigned threads, unsigned flags);

// Parts run on this team from now on, in this process; nullptr: on threads of our own. Where other
// code of the process computes with OpenMP its threads spin for milliseconds after each region, and
// threads of our own would share the cores with them.
void lend_team(Team team);
bool has_team();

}  // namespace prunus
