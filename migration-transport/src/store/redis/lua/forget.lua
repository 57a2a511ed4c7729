-- Forgets a namespace: from here on it is absent. Its blocks are left to sweep.lua.
--
-- Keys: spaces, forgotten, space, blocks, used, dying. Arguments: clock offset, id, VM, lease of an
-- unknown id, most forgotten ids. A record that is damaged names no VM, and anybody can remove it.
local at = now(ARGV[1])
local record = redis.call('HGET', KEYS[3], 'record')
if record and #record >= 16 and string.sub(record, 1, 16) ~= ARGV[3] then return { 'vm' } end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', at)
local remembered = redis.call('ZSCORE', KEYS[2], ARGV[2])
if not remembered and redis.call('ZCARD', KEYS[2]) >= tonumber(ARGV[5]) then return { 'many' } end
local lease = ARGV[4]
if record then
  lease = redis.call('HGET', KEYS[3], 'lease') or lease
  redis.call('DECRBY', KEYS[5], redis.call('HGET', KEYS[3], 'bytes') or '0')
end
local ends = math.max(at + tonumber(lease), tonumber(remembered or '0'))
redis.call('ZADD', KEYS[2], string.format('%.0f', ends), ARGV[2])
redis.call('ZREM', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[3])
if redis.call('EXISTS', KEYS[4]) == 1 then redis.call('SADD', KEYS[6], ARGV[2]) end
return { 'ok' }
