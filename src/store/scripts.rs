//! The scripts that run inside Redis, each in one step. The commands that they send are those that the user `worker`
//! must be permitted.

use redis::Script;

/// All scripts; their digests are computed once.
pub(super) struct Scripts {
    pub(super) beat: Script,
    pub(super) claim: Script,
    pub(super) note: Script,
    pub(super) release: Script,
    pub(super) count: Script,
    pub(super) hold: Script,
    pub(super) let_go: Script,
}

impl Scripts {
    pub(super) fn new() -> Self {
        Self {
            beat: Script::new(BEAT),
            claim: Script::new(CLAIM),
            note: Script::new(NOTE),
            release: Script::new(RELEASE),
            count: Script::new(COUNT),
            hold: Script::new(HOLD),
            let_go: Script::new(LET_GO),
        }
    }
}

/// Writes the record, the index entry and the events of one heartbeat. Keys of the wrong Redis type are
/// deleted first. A live record of another incarnation is never overwritten: the heartbeat then goes
/// under a name of this incarnation's own. Who leaves the index because it beats no longer has not said goodbye: whoever
/// takes it out, and nobody else, writes that it is lost; not where a list of permissions of before does not let us see who
/// that is.
const BEAT: &str = r"
for i, kind in ipairs({'string', 'string', 'zset', 'stream'}) do
  local found = redis.call('TYPE', KEYS[i]).ok
  if found ~= kind and found ~= 'none' then redis.call('DEL', KEYS[i]) end
end
local function foreign()
  local raw = redis.call('GET', KEYS[1])
  if not raw then return nil end
  local ok, record = pcall(cjson.decode, raw)
  if not ok or type(record) ~= 'table' then return nil end
  if record.incarnation == ARGV[1] or record.state == 'stopped' or record.incarnation == ARGV[6] then return nil end
  return record
end
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local ttl = tonumber(ARGV[3])
local other = foreign()
local record, member, mine = KEYS[1], ARGV[4], true
if other then record, member, mine = KEYS[2], ARGV[5], false end
redis.call('SET', record, ARGV[2], 'PX', ttl)
if mine then
  redis.call('DEL', KEYS[2])
  redis.call('ZREM', KEYS[3], ARGV[5])
end
if ARGV[7] == '1' then redis.call('ZREM', KEYS[3], member) else redis.call('ZADD', KEYS[3], string.format('%.0f', now), member) end
local missed = '(' .. string.format('%.0f', now - ttl)
local lost = redis.pcall('ZRANGEBYSCORE', KEYS[3], '-inf', missed)
for _, id in ipairs(lost.err and {} or lost) do
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', 2000, '*', 'worker_id', id, 'incarnation', '', 'from', '', 'to', 'lost', 'detail', 'record_expired', 'at', string.format('%.0f', now))
end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', missed)
local at = 8
while ARGV[at] do
  local count = tonumber(ARGV[at])
  local fields = {}
  for i = 1, count do fields[i] = ARGV[at + i] end
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', 2000, '*', unpack(fields))
  at = at + count + 1
end
if mine then return {'', '0', ''} end
local space = type(other.pid_space) == 'string' and other.pid_space or ''
return {tostring(other.incarnation), string.format('%.0f', tonumber(other.pid) or 0), space}
";

/// Looks up a job's result and marks the job. A job that has a result needs no marks, so they are
/// deleted. Beside marks of other workers ours is written only if the caller insists (`ARGV[4]`): it
/// first has to find out what became of them.
const CLAIM: &str = r"
local stored = redis.call('GET', KEYS[1])
if stored then
  redis.call('DEL', KEYS[2])
  return {stored, {}}
end
local marks = redis.call('HGETALL', KEYS[2])
local alone = true
for i = 1, #marks, 2 do
  if marks[i] ~= ARGV[1] then alone = false end
end
if alone or ARGV[4] == '1' then
  redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
  redis.call('EXPIRE', KEYS[2], ARGV[3])
end
return {false, marks}
";

/// Adds a word to our mark, or takes it back. A mark that is gone is not restored, and one that is counted as a death stays
/// as it is.
const NOTE: &str = r"
local mark = redis.call('HGET', KEYS[1], ARGV[1])
if not mark or string.match(mark, '^%S+') ~= ARGV[2] then return 0 end
local noted = ARGV[2]
if ARGV[3] ~= '' then noted = noted .. ' ' .. ARGV[3] end
redis.call('HSET', KEYS[1], ARGV[1], noted)
return 1
";

/// Removes our mark, counted as a death or not, unless we have marked the job anew since; where the job
/// is answered (`ARGV[3]`) it also removes the other marks that count as deaths. Stores the result, if
/// there is one to store, unless one is stored already; returns the one that was.
const RELEASE: &str = r"
local mark = redis.call('HGET', KEYS[1], ARGV[1])
local began = mark and string.match(mark, '^%S+')
if began == ARGV[2] or began == 'dead:' .. ARGV[2] then redis.call('HDEL', KEYS[1], ARGV[1]) end
if ARGV[3] == '1' then
  local marks = redis.call('HGETALL', KEYS[1])
  for i = 1, #marks, 2 do
    if string.sub(marks[i + 1], 1, 5) == 'dead:' then redis.call('HDEL', KEYS[1], marks[i]) end
  end
end
if not KEYS[2] then return false end
return redis.call('SET', KEYS[2], ARGV[4], 'NX', 'GET', 'EX', ARGV[5])
";

/// Marks the attempts of dead workers as deaths. A mark that is gone is not restored, and one that is
/// counted stays as it is.
const COUNT: &str = r"
for _, field in ipairs(ARGV) do
  local mark = redis.call('HGET', KEYS[1], field)
  if mark and string.sub(mark, 1, 5) ~= 'dead:' then redis.call('HSET', KEYS[1], field, 'dead:' .. mark) end
end
return 1
";

/// Takes or renews the lease on swapping weights.
const HOLD: &str = r"
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
";

/// Gives up the lease on swapping weights, if it is still ours.
const LET_GO: &str = r"
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
return 1
";
